"""Payloads, topics, texts and settings files of every kind, the same for the same seed."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

from fuzzer.words import BYTES, LITERALS, WORDS
from phid import commands, formats, messages, requests, settings, watches
from phid.traffic import Inbound

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
LIMIT_BYTES = 1_048_576

# One grey pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)


def seeds() -> list[bytes]:
    """What the wire's own files hold."""
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.json"))]


class Source:
    """Payloads, topics and texts of every kind, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self._seeds = seeds()
        self._keys = sorted(
            {
                key
                for model in (
                    *(requests.Request, requests.ChatMessage, formats.ResponseFormat),
                    formats.JsonSchema,
                    *(commands.CancelRequest, commands.Command, messages.Result),
                    *(messages.ErrorMessage, messages.Delta, messages.Accepted),
                    *(messages.CtlReply, messages.UsageReport, messages.Timing),
                    *(messages.Status, messages.Info, messages.JobEvent, messages.StateEvent),
                )
                for key in model.model_fields
            }
        )
        self._config = (ROOT / "config" / "phid.toml").read_text("utf-8")

    def payload(self) -> bytes:
        """Bytes as a client may send them."""
        kind = self.dice.random()
        if kind < 0.35:
            return self._mutated(self.dice.choice(self._seeds))
        if kind < 0.87:
            return self._grammatical()
        if kind < 0.97:
            return self.dice.randbytes(self.dice.choice((0, 1, 2, 7, 60, 500)))
        return self._mutated(self._grammatical())

    def large(self) -> bytes:
        """Up to the limit of a payload, of one thing over and over."""
        if self.dice.random() < 0.5:
            return self._large_json()
        unit = self.dice.choice(
            (
                *(b"[", b'{"a":', b'{"prompt":"x","tags":{', b"9", b'"', b"\\", b" ", b"\xff"),
                *(b'{"k":1},', b'["x"],', b"[],", b"[1],", b'"[",', b"1.5,", b"{},"),
                *("😀".encode(), b"\\ud83d", b"\\u0000", b"1,", b"<|end|>"),
            )
        )
        head = self.dice.choice(
            (
                *(
                    b"",
                    b'{"prompt":"',
                    b'{"messages":[',
                    b'{"stop":[',
                    b'{"tags":{"a":',
                    b'{"id":"',
                ),
                *(b'{"prompt":"x","seed":', b'{"prompt":"x","tags":{"a":"'),
            )
        )
        tail = self.dice.choice((b"", b'"}', b"]}", b"}}", b"}"))
        room = self.dice.choice((LIMIT_BYTES, LIMIT_BYTES // 2, 70_000)) - len(head) - len(tail)
        return head + unit * (room // len(unit)) + tail

    def _large_json(self) -> bytes:
        turn = {"role": "user", "content": self.text() or "x"}
        count = self.dice.choice((1000, 12_000, 24_000))
        whole: dict[str, Any] = self.dice.choice(
            (
                {"prompt": (self.text() or "x") * count},
                {"messages": [turn] * count},
                {"messages": [{**turn, "role": "tool"}] * count},
                {"prompt": "x", "tags": {f"k{n}": n for n in range(count)}},
                {"prompt": "x", "stop": ["x"] * count},
                {f"k{n}": n for n in range(count)},
                {"prompt": "x", "p" * 10 * count: 1},
                {"prompt": "x", "id": "i" * 10 * count},
                {"prompt": "x", "reply_to": "a/" * 10 * count},
                {"prompt": "x", "model": "m" * 10 * count},
            )
        )
        return json.dumps(whole, ensure_ascii=self.dice.random() < 0.5).encode()[:LIMIT_BYTES]

    def _mutated(self, data: bytes) -> bytes:
        dice, work = self.dice, bytearray(data)
        for _ in range(dice.choice((0, 1, 1, 2, 4, 16))):
            at = dice.randint(0, len(work))
            match dice.randrange(6):
                case 0:
                    work[at:at] = dice.choice(BYTES)
                case 1:
                    del work[at : at + dice.choice((1, 2, 8, 64))]
                case 2 if work:
                    work[at % len(work)] = dice.randrange(256)
                case 3 if work:
                    work[at % len(work)] ^= 1 << dice.randrange(8)
                case 4:
                    other = dice.choice(self._seeds)
                    start = dice.randint(0, len(other))
                    work[at:at] = other[start : start + dice.choice((4, 16, 200))]
                case _:
                    work[at:at] = dice.choice((*WORDS, *LITERALS)).encode("utf-8", "surrogatepass")
        return bytes(work)

    def _grammatical(self) -> bytes:
        """JSON of the right keys; most of it a sound request but for a detail."""
        dice = self.dice
        pairs: dict[str, str] = {}
        keys = [*requests.Request.model_fields] if dice.random() < 0.6 else self._keys
        if keys is not self._keys or dice.random() < 0.2:
            pairs["prompt"] = json.dumps(self.text() or "x")
        sound = dice.random() < 0.6
        for _ in range(dice.choice((0, 1, 1, 2, 3, 8))):
            key = dice.choice(keys)
            if dice.random() < 0.03:
                key = self.text()
            likely = self._likely(key) if sound else None
            pairs[key] = self._value(key, 0) if likely is None else json.dumps(likely)
        inside = ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs.items())
        return ("{" + inside + "}").encode("utf-8", "surrogatepass")

    def _value(self, key: str, depth: int) -> str:
        dice = self.dice
        if dice.random() < 0.75 and (likely := self._likely(key)) is not None:
            return json.dumps(likely, ensure_ascii=dice.random() < 0.5)
        match dice.randrange(8 if depth < 3 else 6):
            case 0:
                return json.dumps(self.text(), ensure_ascii=dice.random() < 0.5)
            case 1:
                return str(dice.choice((0, 1, -1, 7, 256, 2**31, 2**63, 2**64, -(2**70))))
            case 2:
                return dice.choice(LITERALS)
            case 3:
                return dice.choice(("true", "false", "null"))
            case 4:
                return repr(dice.uniform(-1, 3))
            case 5:
                return "{}" if dice.random() < 0.5 else "[]"
            case 6:
                inside = (self._value("", depth + 1) for _ in range(dice.randrange(5)))
                return "[" + ",".join(inside) + "]"
            case _:
                keys = [dice.choice((*self._keys, "a", "")) for _ in range(dice.randrange(5))]
                inside = (f"{json.dumps(k)}:{self._value(k, depth + 1)}" for k in keys)
                return "{" + ",".join(inside) + "}"

    def _likely(self, key: str) -> Any:
        dice = self.dice
        return {
            "v": 1,
            "id": dice.choice(("a1", "b-2", self.text())),
            "client": "me",
            "prompt": None,
            "messages": [
                {"role": dice.choice(("system", "user", "assistant")), "content": self.text()}
                for _ in range(dice.randrange(4))
            ],
            "max_tokens": dice.choice((1, 64, 64, 4096, 4097)),
            "temperature": dice.choice((0, 0.7, 0.7, 2, 2.1)),
            "top_p": dice.choice((0, 0.5, 0.5, 1)),
            "top_k": dice.choice((0, 1, 50, 50, 1001)),
            "seed": dice.choice((0, 7, 7, 2**31 - 1, 2**31)),
            "role": dice.choice(("user", "system")),
            "content": self.text(),
            "state": dice.choice(("online", "offline", self.text())),
            "reason": dice.choice(("lwt", self.text())),
            "session": dice.choice(("s1", self.text())),
            "ts": dice.choice((0, 1_800_000_000, 2**32, -1, 2**63)),
            "stop": [self.text() for _ in range(dice.choice((0, 1, 8, 9)))],
            "stream": dice.choice(("none", "delta")),
            "format": {"type": dice.choice(("text", "json"))},
            "deadline_ms": dice.choice((1, 1000, 10**12, 10**20)),
            "priority": dice.choice((0, 5, 9, 10)),
            "reply_to": dice.choice(("phid/v1/client/me/rx", self.text(), self.topic())),
            "tags": {self.text()[:64]: dice.choice((1, 0.5, True, self.text()))},
            "level": "debug",
            "for_s": dice.choice((0, 1, 1e9)),
            "what": "engine",
            "type": dice.choice(("result", "error", "delta", "accepted", "ctl")),
        }.get(key)

    def text(self) -> str:
        """Text as JSON can carry it: no half surrogates."""
        dice = self.dice
        if dice.random() < 0.7:
            return "".join(dice.choices(WORDS, k=dice.choice((1, 1, 2, 5))))
        points = (dice.choice((0x20, 0x7F, 0x2FF, 0xFFFF, 0x10FFFF)) for _ in range(9))
        made = "".join(chr(dice.randint(0, top)) for top in points)
        return made.encode("utf-8", "ignore").decode()

    def topic(self) -> str:
        """A topic as a broker may deliver it: UTF-8, without wildcards more often than not."""
        dice = self.dice
        if dice.random() < 0.7:
            return "phid/v1/porch/in/" + dice.choice(
                (
                    *("text", "text/me", "text/me", "frame/me", "cancel/me", "ctl/ping", "ctl/log"),
                    *("ctl/restart", "ctl/" + dice.choice(WORDS)),
                )
            )
        levels = ["phid", "v1", "porch", "in"]
        levels += dice.choices(
            (*("text", "frame", "cancel", "ctl", "ping", "me", "part", "x.y", "", "a/b"), *WORDS),
            k=dice.choice((0, 1, 2, 2, 2, 3, 5)),
        )
        if dice.random() < 0.2:
            levels[dice.randrange(len(levels))] = dice.choice(("all", "", *WORDS))
        return "/".join(levels)[:65_535]

    def inbound(self) -> Inbound:
        """A message with any of the properties that mean something."""
        dice, topic = self.dice, self.topic()
        return Inbound(
            topic=topic,
            payload=self._fitting(topic) if dice.random() < 0.5 else self.payload(),
            qos=dice.randrange(3),
            retain=dice.random() < 0.05,
            dup=dice.random() < 0.2,
            response_topic=dice.choice(
                (None, None, None, "phid/v1/client/me/rx", self.topic(), self.text())
            ),
            correlation=dice.choice((None, b"", b"\xff\x00", dice.randbytes(40))),
            expiry_s=dice.choice((None, 0, 1, 2**32 - 1)),
            user=tuple((self.text(), self.text()) for _ in range(dice.randrange(3))),
        )

    def frame(self) -> Inbound:
        """A frame request: a picture or what has become of one, its fields beside or around it."""
        dice = self.dice
        picture = self._mutated(PNG) if dice.random() < 0.6 else PNG
        user: list[tuple[str, str]] = []
        payload = picture
        if dice.random() < 0.5:
            encoded = base64.b64encode(picture).decode()
            entry = {"b64": encoded if dice.random() < 0.9 else self.text()}
            if dice.random() < 0.2:
                entry[dice.choice(("label", "mime", "sha256", "part", "url"))] = self.text()
            content = {"prompt": self.text() or "x", "images": [entry] * dice.choice((1, 1, 2, 5))}
            payload = json.dumps(content).encode()
        else:
            user.append(("prompt", self.text() or "x"))
            for _ in range(dice.choice((0, 0, 1, 3))):
                name = dice.choice([*requests.Request.model_fields, self.text()])
                user.append((name, dice.choice(("1", "0.5", "low", "17", "delta", self.text()))))
        return Inbound(
            "phid/v1/porch/in/frame/me", payload, qos=1, retain=False, dup=False, user=tuple(user)
        )

    def answer(self) -> bytes:
        """What a daemon says, or what has become of it."""
        said = [seed for seed in self._seeds if b'"type"' in seed]
        return self._mutated(self.dice.choice(said)) if self.dice.random() < 0.5 else self.payload()

    def watch(self) -> bytes:
        """The payload of ctl/watch: a sound definition but for a detail, or what became of one."""
        dice = self.dice
        if dice.random() < 0.2:
            return self.payload()
        content: dict[str, Any] = {"name": "door", "topic": "cameras/+/snapshot", "prompt": "Who?"}
        for name in dice.choices([*watches.Watch.model_fields], k=dice.randrange(5)):
            sound = {
                "detail": dice.choice(("low", 1, 16, 17)),
                "quiet_hours": dice.choice(("22:00-06:00", "24:00-06:00", "22-6")),
                "topic": dice.choice(("cameras/#", "a/#/b", self.topic())),
                "prompt": dice.choice(("{camera} {label}", "{0}", "{camera", self.text())),
            }
            number = dice.choice((0, 1, 2, 5, 0.5, -1, 1e9, 10**20, True))
            content[name] = sound.get(name, number if dice.random() < 0.8 else self.text())
        if dice.random() < 0.1:
            content[dice.choice(("id", "reply_to", "delete", "prompts", self.text()))] = self.text()
        data = json.dumps(content).encode()
        return self._mutated(data) if dice.random() < 0.2 else data

    def model(self) -> bytes:
        """The payload of ctl/model."""
        dice = self.dice
        if dice.random() < 0.3:
            return self.payload()
        content = {
            "action": dice.choice(("load", "unload", "switch", self.text())),
            "name": dice.choice(("smollm2", "../x", self.text())),
        }
        if dice.random() < 0.3:
            content[dice.choice(("pin", "id", "reply_to", self.text()))] = self.text()
        data = json.dumps(content).encode()
        return self._mutated(data) if dice.random() < 0.3 else data

    def picture(self) -> bytes:
        """What a camera publishes: a picture as it is or in JSON, or what has become of one."""
        dice = self.dice
        data = self._mutated(PNG) if dice.random() < 0.4 else PNG
        if dice.random() < 0.4:
            return data
        text = base64.b64encode(data).decode() if dice.random() < 0.8 else self.text()
        head = dice.choice(("", "", "data:image/png;base64,", "data:,"))
        content: dict[str, Any] = {dice.choice(("b64", "image")): head + text}
        if dice.random() < 0.5:
            content["ts"] = dice.choice((1_800_000_000.5, 0, -1, 10**20, 1e308, "1", None))
        if dice.random() < 0.3:
            content[self.text()] = self.text()
        data = json.dumps(content).encode()
        return self._mutated(data) if dice.random() < 0.2 else data

    def state(self) -> bytes:
        """A state file, whichever, or what has become of one on a bad card."""
        dice = self.dice
        content = {
            "schema": dice.choice((1, 1, 1, 2, "1", True, None)),
            "watches": [json.loads(_or_empty(self.watch())) for _ in range(dice.randrange(3))],
            "off": dice.choice(([], ["door"], [1], "door", None)),
            "filters": dice.choice(([], ["a/#"], {}, 7)),
            "brokers": dice.choice(({}, {"h:1": {"fell_back_at": 1}}, {"h:1": 5}, [1])),
        }
        data = json.dumps(content).encode()
        return self._mutated(data) if dice.random() < 0.5 else data

    def _fitting(self, topic: str) -> bytes:
        """What belongs on this topic, more or less."""
        dice = self.dice
        if "/text" in topic:
            return self._grammatical()
        if "/cancel" in topic:
            keys = [dice.choice([*commands.CancelRequest.model_fields])]
        else:
            keys = dice.sample([*commands.Command.model_fields], 2)
        return json.dumps({key: self._likely(key) for key in keys}).encode()

    def toml(self) -> str:
        """A settings file, or what has become of one."""
        dice = self.dice
        kind = dice.random()
        if kind < 0.5:
            names = dice.sample(sorted(settings.names()), dice.randint(0, 6))
            lines = [f"{name} = {self._toml_value()}" for name in [*names, *self._odd_names()]]
            return "\n".join(dice.sample(lines, len(lines)))
        if kind < 0.9:
            lines = self._config.splitlines()
            some = [re.sub(r"^#(?=\w+ = )", "", line) for line in dice.sample(lines, 12)]
            return "\n".join(some)
        return self._mutated(self._config.encode()).decode("utf-8", "replace")

    def _odd_names(self) -> list[str]:
        odd = ("mqtt", "mqtt.hosts", "a.b.c", "engine.threads.x", "_env_file", "self")
        odd += ("__pydantic_self__", "_cli_parse_args")
        return self.dice.choice(([], [], [self.dice.choice(odd)]))

    def _toml_value(self) -> str:
        dice = self.dice
        return dice.choice(
            (
                *("0", "-1", "1", "1883", "99999999999999999999", "nan", "inf", "-0.0", "1e400"),
                *("true", "[]", "{}", "[1, 'a']", "1979-05-27", "'debug'", "'phid/v1'", "''"),
                json.dumps(self.text(), ensure_ascii=False),
                json.dumps(self.topic(), ensure_ascii=False),
            )
        )


def _or_empty(data: bytes) -> bytes:
    """The data if it is JSON, else an empty object."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return b"{}"
    return data
