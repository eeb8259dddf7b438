"""Topics: what is ours, what may be replied to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid.topics import Address, Topics, is_level, is_publishable, level_from, matches

TOPICS = Topics("phid/v1", "dev")
levels = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
anything = st.text(max_size=80)
# As an attacker would: right parts in wrong places.
parts = st.sampled_from(
    ["phid", "v1", "dev", "in", "out", "res", "client", "me", "rx", "", "+", "#", "..", "status"]
)
forged = st.lists(parts | anything, min_size=1, max_size=9).map("/".join)


@given(levels, levels)
def test_what_a_requester_publishes_is_parsed_to_what_it_means(client: str, verb: str) -> None:
    assert TOPICS.parse(TOPICS.text(client)) == Address("text", client=client)
    assert TOPICS.parse(TOPICS.cancel(client)) == Address("cancel", client=client)
    assert TOPICS.parse(TOPICS.ctl(verb)) == Address("ctl", verb=verb)
    assert TOPICS.parse("phid/v1/dev/in/text") == Address("text", client="anon")


@given(forged | anything)
def test_parsing_takes_anything(topic: str) -> None:
    address = TOPICS.parse(topic)
    if address is not None:
        assert is_level(address.client)
        assert topic.startswith("phid/v1/dev/in/") or address.broadcast


@pytest.mark.parametrize(
    "topic",
    [
        "phid/v1/dev/in",
        "phid/v1/dev/in/",
        "phid/v1/dev/in/text/",
        "phid/v1/dev/in/text/a/b",
        "phid/v1/dev/in/text/a.b",
        "phid/v1/dev/in/ctl",
        "phid/v1/dev/in/ctl/ping/x",
        "phid/v1/other/in/text",
        "phid/v1/dev/out/status",
        "phid/v1/all/in/ctl/restart",
        "phid/v1/all/in/text",
        "Phid/v1/dev/in/text",
        "/phid/v1/dev/in/text",
    ],
)
def test_what_is_not_ours_is_none(topic: str) -> None:
    assert TOPICS.parse(topic) is None


@given(forged | anything)
def test_a_reply_topic_is_the_clients_own_and_can_be_published_to(topic: str) -> None:
    if TOPICS.may_reply(topic, "me"):
        own = ("phid/v1/dev/out/res/me/", "phid/v1/client/me/")
        assert topic.startswith(own)
        assert is_publishable(topic)
        assert topic.count("/") <= 7
    assert not TOPICS.may_reply(f"phid/v1/dev/in/{topic}", "me")
    assert not TOPICS.may_reply(f"phid/v1/client/mean/{topic}", "me")


@given(levels, levels)
def test_the_default_and_the_inbox_are_always_allowed(client: str, request_id: str) -> None:
    assert TOPICS.may_reply(TOPICS.res(client, request_id), client)
    assert TOPICS.may_reply(TOPICS.rx(client), client)


def test_more_is_allowed_only_by_a_filter() -> None:
    assert not TOPICS.may_reply("app/answers/1", "me")
    assert TOPICS.may_reply("app/answers/1", "me", ("app/answers/+",))
    assert not TOPICS.may_reply("app/answers/1/2", "me", ("app/answers/+",))
    assert TOPICS.may_reply("app/answers/1/2", "me", ("app/#",))
    assert not TOPICS.may_reply("app/+/x", "me", ("#",))
    assert not TOPICS.may_reply("$SYS/x", "me", ("#",))
    assert not TOPICS.may_reply("a\0b", "me", ("#",))
    assert not TOPICS.may_reply("x" * 600, "me", ("#",))


@pytest.mark.parametrize(
    ("topic_filter", "topic", "covered"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "a/b", True),
        ("+/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a", "b", False),
    ],
)
def test_filters_cover_as_mqtt_says(topic_filter: str, topic: str, covered: bool) -> None:
    assert matches(topic_filter, topic) is covered


@given(anything)
def test_any_name_has_a_legal_level(name: str) -> None:
    assert is_level(level_from(name))


@pytest.mark.parametrize("text", ["", "a/b", "a.b", "a+", "#", "a b", "ä", "a\n", "a" * 65, "\0"])
def test_what_is_no_level(text: str) -> None:
    assert not is_level(text)


@pytest.mark.parametrize("device", ["all", "pool", "client", "", "a/b", "a.b"])
def test_a_device_needs_a_level_of_its_own(device: str) -> None:
    with pytest.raises(ValueError, match="device"):
        Topics("phid/v1", device)


@pytest.mark.parametrize("base", ["", "/", "a//b", "a/b/c/d", "$SYS", "a/+"])
def test_a_base_must_leave_room_and_be_of_levels(base: str) -> None:
    with pytest.raises(ValueError, match="base"):
        Topics(base, "dev")
