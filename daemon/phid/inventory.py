"""What is said of a model, here or in the catalog: as values for programs, in words for people."""

from __future__ import annotations

from typing import Any

from phid import fit, graphs, manifest, soundness
from phid.catalog import Build
from phid.store import StoredModel, StoreError


def facts(model: StoredModel | None, build: Build | None) -> dict[str, Any]:
    """All that is known of a model that is here, of its build, or of both. Raises StoreError."""
    known: dict[str, Any] = build_row(build) if build else {}
    known["sha256"] = build.sha256 if build else {}
    if model is not None:
        known |= row(model, build) | _made(model)
    needs = _needs(model, build)
    known["memory_bytes"] = needs.memory_bytes(fit.CONTEXT)
    known["kv_bytes_per_token"] = needs.kv_bytes_per_token
    known["here"] = model is not None
    return known


def row(model: StoredModel, build: Build | None) -> dict[str, Any]:
    """A model that is here, in short."""
    return {
        "name": model.name,
        "type": model.type,
        "kind": model.kind,
        "context": model.context,
        "bytes": model.size_bytes,
        "path": str(model.path),
        "here": True,
        "license": build.license if build else _manifest_license(model),
    }


def build_row(build: Build) -> dict[str, Any]:
    """What the catalog says of a build, but for its files."""
    said = build.model_dump(mode="json", exclude={"files", "size_bytes"})
    return said | {"bytes": build.size_bytes, "pinned": build.pinned}


def line(model: StoredModel) -> str:
    """A model that is here, in a line."""
    size = f"{model.size_bytes / 1e6:.0f} MB"
    return f"{model.name}  {model.type}, context {model.context}, {size}  {model.path}"


def build_line(build: Build) -> str:
    """What could be had, in a line, without its name."""
    size = f"{'about ' * build.size_is_estimate}{build.size_bytes / 1e9:.1f} GB"
    says = f"{build.title}, {build.kind}, {'/'.join(build.providers)}, {size}"
    if build.source == "builder":
        says += "; not to be pulled: a command makes it"
    if build.unsupported:
        says += "; not run by phid yet"
    return says


def in_words(known: dict[str, Any], build: Build | None) -> dict[str, str]:
    """What is known of a model in words, by heading."""
    lines = {"name": str(known["name"])}
    if build is not None:
        lines["model"] = f"{build.title or build.name}, {build.kind}"
        if build.source == "hub":
            pin = "pinned" if build.pinned else "not pinned: the first pull records the commit"
            lines["from"] = f"{build.repo}, {build.folder or '/'}, {build.revision} ({pin})"
        if build.command:
            lines["made by"] = making(build)
        if build.unsupported:
            lines["not yet"] = f"phid cannot run it: {build.unsupported}"
        lines["runs on"] = ", ".join(build.providers)
    lines["licence"] = str(known.get("license", "unknown"))
    about = "about " if build and build.size_is_estimate and not known["here"] else ""
    lines["size"] = f"{about}{known['bytes'] / 1e6:.0f} MB"
    cache = known["kv_bytes_per_token"] / 1024
    gb = known["memory_bytes"] / 1e9
    lines["memory"] = f"{gb:.1f} GB at {fit.CONTEXT} tokens; {cache:.0f} KiB of it for each token"
    lines["context"] = f"{known['context']} tokens"
    lines["hashes"] = f"{len(known['sha256'])} known"
    if "manifest" in known:
        lines["manifest"] = known["manifest"]
    if made := known.get("made_from"):
        lines["made from"] = ", ".join(f"{key} {value}" for key, value in made.items() if value)
        lines["kept at"] = str(known["kept_at"])
    lines["here"] = str(known["path"]) if known["here"] else "no"
    return lines


def making(build: Build) -> str:
    """The commands that make a build which nobody offers, and take it in."""
    return f"{build.command} && phid models import FOLDER --name {build.name}"


def _needs(model: StoredModel | None, build: Build | None) -> fit.Needs:
    """What a model that is here needs, or else what its build says. Raises StoreError."""
    if model is None:
        assert build is not None
        return fit.of_build(build)
    try:
        return fit.of_folder(model, build)
    except (soundness.NoModel, graphs.NotOnnx) as error:
        says = f"{model.path} is no whole model ({error}): see `phid models verify {model.name}`"
        raise StoreError(says) from None


def _manifest_license(model: StoredModel) -> str:
    try:
        made = manifest.read(model.path)
    except (manifest.Newer, manifest.Damaged):
        made = None
    return made.license if made else "unknown"


def _made(model: StoredModel) -> dict[str, Any]:
    """What the manifest says of a model."""
    try:
        made = manifest.read(model.path)
    except (manifest.Newer, manifest.Damaged) as error:
        return {"manifest": str(error)}
    if made is None:
        return {}
    files = {name: kept.sha256 for name, kept in made.files.items()}
    return {"made_from": made.source, "kept_at": made.kept_at, "sha256": files}
