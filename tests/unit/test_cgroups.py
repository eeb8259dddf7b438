from __future__ import annotations

from pathlib import Path, PurePosixPath

from phid import cgroups


def test_the_groups_of_both_versions_are_found() -> None:
    lines = ["9:name=systemd:/x", "3:cpuset:/y", "2:cpu,cpuacct:/a:b"]
    lines.append("0::/system.slice/phid.service")
    assert cgroups.own("\n".join(lines)) == {
        "": PurePosixPath("/system.slice/phid.service"),
        "name=systemd": PurePosixPath("/x"),
        "cpuset": PurePosixPath("/y"),
        "cpu": PurePosixPath("/a:b"),
        "cpuacct": PurePosixPath("/a:b"),
    }
    assert cgroups.own("") == {}


def test_the_limits_of_all_groups_above_hold_too() -> None:
    found = cgroups.folders(Path("/fs"), PurePosixPath("/system.slice/phid.service"))
    expected = ["/fs/system.slice/phid.service", "/fs/system.slice", "/fs"]
    assert [str(folder) for folder in found] == expected
    assert list(cgroups.folders(Path("/fs"), PurePosixPath("/"))) == [Path("/fs")]


def test_what_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert cgroups.read(tmp_path / "absent") == ""
    (tmp_path / "odd").write_bytes(b"\xff")
    assert cgroups.read(tmp_path / "odd") == ""
