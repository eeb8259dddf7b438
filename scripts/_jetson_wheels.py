"""What a wheel of the GPU runtime holds: whether phid on a Jetson can use it.

`check DIR` reads the wheels in DIR; `rest LOCK` is the lock file without the runtimes, `list DIR`
the requirements of a finished wheelhouse.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# By what they give to Python; the GPU builds are published under names of their own.
RUNTIME = {"onnxruntime", "onnxruntime-gpu"}
GENAI = {"onnxruntime-genai", "onnxruntime-genai-cuda"}

_AARCH64 = 183  # e_machine: elf(5)
# A device's code lies in regions of its own in a library: a header of 16 bytes, and in it entries
# that say their kind and for which architecture they are. No document has it; found by reading
# libraries whose architectures are known, as cuobjdump --list-elf tells them.
_REGION = struct.pack("<I", 0xBA55ED50)
_PTX, _CUBIN = 1, 2


@dataclass
class Code:
    """For which architectures of GPU a library has code: machine code, and PTX to translate."""

    cubin: set[int] = field(default_factory=set)
    ptx: set[int] = field(default_factory=set)

    def runs_on(self, sm: int) -> bool:
        """Whether a GPU of this architecture runs it.

        On a Jetson machine code of a relative (sm_80 on sm_87) does not run: tried in jax-ml/jax
        pull request 40492. PTX of an older one does, translated at the first start.
        """
        return sm in self.cubin or any(ptx <= sm for ptx in self.ptx)

    def __str__(self) -> str:
        names = [f"sm_{n}" for n in sorted(self.cubin)] + [f"PTX {n}" for n in sorted(self.ptx)]
        return ", ".join(names) or "no GPU code"


def code_in(library: bytes) -> Code:
    """The GPU code of a library."""
    code = Code()
    at = library.find(_REGION)
    while at >= 0:
        header, size = struct.unpack_from("<HQ", library, at + 6)
        end = min(at + header + size, len(library))
        entry = at + header
        while entry + 32 <= end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", library, entry)
            (architecture,) = struct.unpack_from("<I", library, entry + 28)
            if kind == _CUBIN:
                code.cubin.add(architecture)
            elif kind == _PTX:
                code.ptx.add(architecture)
            if not entry_header:
                break
            entry += entry_header + entry_size
        at = library.find(_REGION, max(end, at + 4))
    return code


def problems(wheel: Path, sm: int, python: tuple[int, int], wanted: list[Requirement]) -> list[str]:
    """What keeps phid from using this wheel, a sentence each."""
    name, version, _, tags = parse_wheel_filename(wheel.name)
    found = []
    pythons = {"py3", f"py{python[0]}{python[1]}", f"cp{python[0]}{python[1]}"}
    if not any(tag.interpreter in pythons or _stable(tag, python) for tag in tags):
        made_for = ", ".join(sorted({tag.interpreter for tag in tags}))
        found.append(f"is for {made_for}, and phid's Python here is {python[0]}.{python[1]}")
    if not any(tag.platform.endswith("_aarch64") for tag in tags):
        found.append(f"is for {', '.join(sorted({tag.platform for tag in tags}))}, not for aarch64")
    found += [
        f"is {version}, and {want} is wanted"
        for want in wanted
        if not want.specifier.contains(Version(version.base_version))
    ]
    code = Code()
    with zipfile.ZipFile(wheel) as archive:
        for member, content in _libraries(archive):
            machine = struct.unpack_from("<H", content, 18)[0]
            if machine != _AARCH64:
                found.append(f"{member} is of another machine (ELF {machine})")
            here = code_in(content)
            code.cubin |= here.cubin
            code.ptx |= here.ptx
    if not code.runs_on(sm):
        found.append(f"has no code for this GPU, sm_{sm}: it has {code}")
    return [f"{name} {version} {problem}" for problem in found]


def check(folder: Path, sm: int, python: tuple[int, int]) -> list[str]:
    """What is wrong with the two wheels in a folder; nothing: they can be used."""
    found: list[str] = []
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in ours["dependencies"]]
    genai = _the_one(folder, GENAI, found)
    runtime = _the_one(folder, RUNTIME, found)
    if genai:
        found += problems(genai, sm, python, [want for want in wanted if want.name in GENAI])
    if genai and runtime:
        # It says which runtime it was built against.
        needs = [want for want in _requirements(genai) if want.name in RUNTIME]
        name = parse_wheel_filename(runtime.name)[0]
        if needs and name not in {want.name for want in needs}:
            found.append(f"{genai.name} asks for {needs[0]}, and pip does not take {name} for it")
        found += problems(runtime, sm, python, needs)
    return found


def requirements(wheelhouse: Path) -> str:
    """Every wheel of a wheelhouse with its hash, but for phid itself: a lock file like run.txt.

    phid is installed after them, without its dependencies: it asks for the CPU's runtime by name.
    """
    lines = []
    for wheel in sorted(wheelhouse.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        if name == "phid":
            continue
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    return "".join(lines)


def rest(lock: Path) -> str:
    """A lock file without the runtimes, which come from elsewhere."""
    kept, keeps = [], True
    for line in lock.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.startswith(" "):
            keeps = line.partition("==")[0] not in RUNTIME | GENAI
        if keeps:
            kept.append(line)
    return "".join(kept)


def _the_one(folder: Path, names: set[str], found: list[str]) -> Path | None:
    wheels = [w for w in folder.glob("*.whl") if parse_wheel_filename(w.name)[0] in names]
    if len(wheels) == 1:
        return wheels[0]
    says = " or ".join(sorted(names))
    found.append(f"{folder} has {len(wheels)} wheels of {says}: one is needed")
    return None


def _stable(tag: Tag, python: tuple[int, int]) -> bool:
    """Whether a wheel of the stable ABI is for this Python or an older one."""
    least = tag.interpreter.removeprefix("cp3")
    return tag.abi == "abi3" and least.isdecimal() and int(least) <= python[1]


def _requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def _libraries(archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    for member in archive.namelist():
        if ".so" in Path(member).name:
            content = archive.read(member)
            if content.startswith(b"\x7fELF"):
                yield member, content


def main() -> int:
    """The command line: 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "list", "rest"))
    parser.add_argument("path", type=Path, help="of wheels; of the lock file for `rest`")
    parser.add_argument("--sm", type=int, default=87, help="87: Orin; 110: Thor")
    parser.add_argument("--output", type=Path, help="where `list` and `rest` write")
    options = parser.parse_args()
    if options.what != "check":
        makes = {"list": requirements, "rest": rest}[options.what]
        text = makes(options.path)
        if options.output:
            options.output.write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
        return 0
    found = check(options.path, options.sm, sys.version_info[:2])
    for problem in found:
        print(problem, file=sys.stderr)
    if not found:
        print(f"the wheels in {options.path} have code for sm_{options.sm}, and fit phid")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
