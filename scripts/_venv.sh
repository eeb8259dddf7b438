# shellcheck shell=bash
# Sourced by the scripts beside it: `make_venv NAME` makes or refreshes .venv from lock/NAME.txt,
# without root, with uv where there is one, else with pip.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Whether phid runs on this Python: 3.11 to 3.13, the ones its packages have wheels for.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# The newest of them that is here.
find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null && is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "phid needs Python 3.11, 3.12 or 3.13; here is $(python3 --version 2>&1 || true)"
}

# A venv without pip gets it from Debian's own package of pip's wheel: signed, and no root needed.
debian_pip() {
    local scratch=$1
    command -v apt-get >/dev/null || die "this Python has no ensurepip: install python3-venv"
    mkdir -p "$scratch"/lists/partial "$scratch"/cache/archives/partial
    local options=(-qq -o "Dir::State::Lists=$scratch/lists" -o "Dir::Cache=$scratch/cache"
        -o "APT::Sandbox::User=$(id -un)")
    apt-get "${options[@]}" update >&2
    (cd "$scratch" && apt-get "${options[@]}" download python3-pip-whl >&2)
    dpkg-deb -x "$scratch"/python3-pip-whl_*.deb "$scratch"
    echo "$scratch"/usr/share/python-wheels/pip-*.whl
}

make_venv() {
    local lock=$root/scripts/lock/$1.txt stamp=$venv/.stamp-$1 wanted
    wanted=$(cat "$lock" "$root/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum)
    if [ -x "$python" ] && "$python" -c '' 2>/dev/null && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    say "installing what lock/$1.txt names into .venv: a minute or two the first time"
    rm -f "$venv"/.stamp-*
    if uv --version >/dev/null 2>&1; then # a version manager's stub may be there without uv
        "$python" -c '' 2>/dev/null || uv venv --quiet --clear --python "$(find_python)" "$venv"
        uv pip sync --python "$python" --require-hashes "$lock" >&2
        uv pip install --python "$python" --quiet --no-deps --no-build-isolation -e "$root"
    else
        with_pip "$lock"
    fi
    echo "$wanted" >"$stamp"
}

with_pip() {
    local lock=$1 base scratch
    base=$(find_python)
    local pip=("$python" -m pip)
    if ! "${pip[@]}" --version >/dev/null 2>&1; then
        rm -rf "$venv"
        if ! "$base" -m venv "$venv" >/dev/null 2>&1; then
            say "this Python has no ensurepip: fetching pip's wheel from Debian's packages"
            rm -rf "$venv"
            "$base" -m venv --without-pip "$venv"
            scratch=$(mktemp -d)
            "$python" "$(debian_pip "$scratch")/pip" install --quiet --disable-pip-version-check \
                --require-hashes --only-binary :all: -r "$root/scripts/lock/pip.txt"
            rm -rf "$scratch"
        fi
    fi
    "${pip[@]}" install --disable-pip-version-check --progress-bar off --require-hashes \
        --only-binary :all: -r "$lock" |
        { grep --line-buffered -v '^Requirement already' || true; } >&2 # pip's failure stays one
    "${pip[@]}" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$root"
}
