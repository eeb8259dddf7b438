"""The catalog that ships: what stands in it can be true, and is found."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phid import catalog, demo, fit
from phid.catalog import Build, KnownFile
from phid.settings import Settings

OFFICIAL = {
    *("phi-3-mini-4k", "phi-3-mini-4k-cuda", "phi-3-mini-4k-directml"),
    *("phi-3-mini-128k", "phi-3-mini-128k-cuda", "phi-3-mini-128k-directml"),
    *("phi-3-small-8k-cuda", "phi-3-small-128k-cuda"),
    *("phi-3-medium-4k", "phi-3-medium-4k-cuda", "phi-3-medium-4k-directml"),
    *("phi-3-medium-128k", "phi-3-medium-128k-cuda", "phi-3-medium-128k-directml"),
    *("phi-3-vision", "phi-3.5-mini", "phi-3.5-mini-gpu", "phi-3.5-vision", "phi-3.5-vision-gpu"),
    *("phi-4-mini", "phi-4-mini-gpu", "phi-4-multimodal-gpu"),
}


def test_every_official_build_is_there() -> None:
    assert {b.name for b in catalog.shipped()} == OFFICIAL | {demo.NAME, "phi-3.5-moe"}


@pytest.mark.parametrize("build", catalog.shipped(), ids=lambda build: build.name)
def test_a_build_says_all_that_can_be_asked_of_it(build: Build) -> None:
    assert build.title
    assert build.license in {"MIT", "Apache-2.0"}
    assert build.context >= 4096
    assert build.size_bytes > 0
    assert build.layers > 0
    assert build.width > 0
    assert build.vocabulary > 0
    assert build.kv_bytes_per_token > 0
    if build.source == "hub":
        assert build.repo.startswith("microsoft/")
        assert build.folder
    # The cache has 2 x layers x (heads x size) numbers, and no more heads than the model is wide.
    numbers = 4 if build.providers == ("cpu",) else 2
    assert build.kv_bytes_per_token % (2 * build.layers * numbers) == 0
    assert build.kv_bytes_per_token <= 2 * build.layers * build.width * numbers
    assert 0 < fit.of_build(build).read_bytes < build.size_bytes or build.source == "demo"


def test_the_vision_build_is_pinned_and_its_hashes_are_known() -> None:
    build = catalog.find("phi-3.5-vision")
    assert build.pinned
    assert len(build.files) == 9
    assert not catalog.find("phi-3.5-mini").pinned


def test_the_nearest_name_is_told() -> None:
    with pytest.raises(catalog.Unknown, match=r"did you mean phi-3\.5-mini\?"):
        catalog.find("phi-3.5-mni")


def test_a_build_of_ones_own_takes_the_place_of_a_shipped_one() -> None:
    own = Build(name="phi-3.5-mini", repo="acme/mine")
    assert catalog.find("phi-3.5-mini", [own]) is own
    assert len(catalog.builds([own])) == len(catalog.shipped())


def test_builds_come_from_the_settings() -> None:
    entry = {"name": "mine", "repo": "acme/mine", "files": [{"name": "a", "sha256": "0" * 64}]}
    settings = Settings(device="dut", catalog=[entry])  # type: ignore[arg-type]
    assert catalog.find("mine", settings.catalog).files == (KnownFile(name="a", sha256="0" * 64),)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "mine"}, "mine needs repo = OWNER/NAME"),
        ({"name": "mine", "repo": "https://hub/acme/mine"}, "mine needs repo = OWNER/NAME"),
        ({"name": "mine", "repo": "acme/my model"}, "mine needs repo = OWNER/NAME"),
        ({"name": "../mine", "repo": "a/b"}, "pattern"),
        ({"name": "mine", "repo": "a/b", "rvision": "x"}, "catalog.0.rvision"),
        ({"name": "mine", "repo": "a/b", "files": [{"name": "a", "sha256": "0"}]}, "pattern"),
        ({"name": "mine", "source": "demo"}, "the demo model is phid's own"),
    ],
)
def test_a_build_that_cannot_be_is_refused(entry: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match="catalog") as error:
        Settings(device="dut", catalog=[entry])  # type: ignore[arg-type]
    assert says in str(error.value)


WORDS = st.text("ab-._/ é\n", max_size=8)


@given(st.one_of(WORDS, st.tuples(WORDS, WORDS).map("/".join)))
@example("a/" + "b" * 97)
@example("a/b.git")
@example("a--b/c")
def test_a_repository_is_called_as_the_hubs_own_client_allows(name: str) -> None:
    validators = pytest.importorskip("huggingface_hub.utils")
    try:
        validators.validate_repo_id(name)
        allowed = "/" in name  # it knows those of no owner, too
    except validators.HFValidationError:
        allowed = False
    assert catalog.is_repository(name) == allowed
