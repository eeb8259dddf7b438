"""What the documents say of the code is what the code says."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

from phid import settings
from phid.control import VERBS
from phid.errors import Code
from phid.health import KEYS
from phid.messages import ErrorMessage, Result
from phid.requests import Request
from phid.settings import Settings
from phid.topics import Topics
from phid.watches import Watch
from rig import ROOT


def table(path: Path, marker: str) -> list[list[str]]:
    """The rows of the table between a marker and its end."""
    text = path.read_text()
    part = text[text.index(f"<!-- {marker}") :].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("|").strip() for cell in row] for row in rows[2:]]


def test_the_readme_lists_every_field_of_a_request() -> None:
    expected = []
    for name, field in Request.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if hasattr(default, "model_dump"):
            default = default.model_dump(exclude_none=True)
        shown = "" if default is None else f"`{json.dumps(default)}`"
        expected.append([f"`{name}`", shown, field.description])
    assert table(ROOT / "README.md", "request fields") == expected


def test_the_readme_lists_every_field_of_a_watch() -> None:
    expected = []
    for name, field in Watch.model_fields.items():
        default = None if field.is_required() else field.default
        if hasattr(default, "model_dump"):
            default = default.model_dump(exclude_none=True)
        shown = "" if default is None else f"`{json.dumps(default)}`"
        expected.append([f"`{name}`", shown, field.description])
    assert table(ROOT / "README.md", "watch fields") == expected


def test_the_readmes_model_of_ones_own_is_taken() -> None:
    text = (ROOT / "README.md").read_text().partition("<!-- catalog example")[2]
    example = text.partition("```toml\n")[2].partition("```")[0]
    (build,) = Settings(device="dut", **tomllib.loads(example)).catalog
    assert build.name == "my-phi"


def test_the_architecture_lists_every_health_key() -> None:
    rows = table(ROOT / "daemon" / "ARCHITECTURE.md", "health keys")
    assert rows == [[f"`{key}`", meaning] for key, meaning in KEYS.items()]


def test_the_architecture_has_a_place_for_every_module() -> None:
    rows = table(ROOT / "daemon" / "ARCHITECTURE.md", "modules")
    placed = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    there = {path.stem for path in (ROOT / "daemon" / "phid").glob("[a-z]*.py")}
    assert sorted(placed) == sorted(there), "each stands there once"


PAGES = [ROOT / "README.md", *sorted((ROOT / "daemon").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(
        r"`(?:pytest )?((?:scripts|tests|config|systemd|daemon)/[\w./-]+)", text
    ):
        assert (ROOT / name).exists(), name
    for link, part in re.findall(r"\]\((?!http)([^)#]*)(?:#([\w-]*))?\)", text):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert part in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_each_figure_has_a_command_that_can_be_given() -> None:
    scripts = "".join(
        path.read_text(errors="replace")
        for path in (ROOT / "scripts").rglob("*")
        if path.is_file() and path.suffix in ("", ".py") and ".mypy_cache" not in path.parts
    )
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for figure, command, measured, _ in table(ROOT / "daemon" / "FIGURES.md", "figures"):
        assert "`" in command, figure
        assert re.search(r"\d", measured), figure
        for line in re.findall(r"`([^`]*scripts/[^`]*)`", command):
            for option in re.findall(r"--[\w-]+", line):
                assert option in scripts, f"{figure}: {option}"
        for chosen in re.findall(r"pytest [^`]*-k (\w+)", command):
            assert re.search(rf"def test_\w*{chosen}", tests), f"{figure}: {chosen}"


def test_a_decision_is_one_line_with_its_date_and_its_reason() -> None:
    lines = (ROOT / "daemon" / "DECISIONS.md").read_text().splitlines()
    for line in lines[3:]:
        if line and not line.startswith("## "):
            assert re.match(r"- \d{4}-\d\d-\d\d \*\*.+?\*\*.{20,}", line), line


def test_the_readme_lists_every_code_and_verb() -> None:
    text = (ROOT / "README.md").read_text()
    for code in Code:
        assert f"`{code}` {code.status}" in text
    assert re.search(" ".join(VERBS), text)


def topic_table() -> dict[str, list[str]]:
    """The rows below the heading Topics, by topic."""
    text = (ROOT / "README.md").read_text().partition("\n## Topics\n")[2].partition("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def test_the_readme_lists_every_topic() -> None:
    topics = Topics("phid/v1", "DEVICE")
    places = {"client": "CLIENT", "verb": "VERB", "request_id": "ID", "n": "N", "name": "NAME"}
    built = set()
    for name, member in vars(Topics).items():
        if name[0] == "_" or name == "filters":
            continue
        if isinstance(member, property):
            built.add(getattr(topics, name))
        elif callable(member):
            wanted = list(inspect.signature(member).parameters)[1:]
            if set(wanted) <= places.keys():  # else it looks at a topic, and makes none
                built.add(getattr(topics, name)(*(places[place] for place in wanted)))
    assert len(built) >= 10
    levels = r"\b(DEVICE|CLIENT|VERB|ID|N|NAME)\b"
    expected = {re.sub(levels, _in_brackets, topic) for topic in built}
    assert set(topic_table()) == expected


def _in_brackets(match: re.Match[str]) -> str:
    return f"<{match[0].lower()}>"


def test_the_readme_tells_the_quality_of_service_of_every_topic() -> None:
    for topic, (qos, _) in topic_table().items():
        streamed = topic.endswith("<id>")
        assert qos == ("0, 1" if streamed else "0" if topic.endswith("/health") else "1"), topic


def test_a_device_hears_what_the_readme_has_sent_to_it() -> None:
    topics = Topics("phid/v1", "porch")
    for topic in topic_table():
        sent = re.sub("<device>", "porch", topic)
        sent = re.sub("<[a-z]+>", "x", sent.replace("<n>", "0"))
        assert (topics.parse(sent) is not None) == ("/in/" in topic), topic


def test_the_examples_of_settings_are_sound(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        file = tmp_path / "phid.toml"
        file.write_text(block)
        settings.load(file)


def test_the_examples_of_answers_are_answers() -> None:
    block = re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    decoder, text, answers = json.JSONDecoder(), block[1], []
    while text.strip():
        content, end = decoder.raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        answers.append(content)
    assert [answer["type"] for answer in answers] == ["result", "error"]
    result, error = answers
    assert list(Result.model_validate(result).model_dump(exclude_none=True)) == list(result)
    assert list(ErrorMessage.model_validate(error).model_dump(exclude_none=True)) == list(error)


def test_the_examples_of_what_is_heard_are_what_is_sent() -> None:
    block = (ROOT / "README.md").read_text().partition("<!-- heard:")[2].split("```")[1]
    sent = {path.read_text().strip() for path in (ROOT / "tests/golden").glob("*.json")}
    lines = block.strip().splitlines()
    assert len(lines) >= 5
    assert set(lines) <= sent
