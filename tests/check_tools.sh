#!/bin/sh
# Checks what a build needs: Rust, Python with pip or venv, and a C compiler.
# Prints the version found and wanted of each, and ends with 1 when one is missing or too old.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
failed=0

# Whether version $1 is at least version $2, both as dotted numbers.
at_least() {
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

# One line of the report: name, wanted version, found version (empty: none), what to do.
check() {
    if [ -z "$3" ]; then
        echo "$1: found none, wanted $2 or later: $4" >&2
        failed=1
    elif ! at_least "$3" "$2"; then
        echo "$1: found $3, wanted $2 or later: $4" >&2
        failed=1
    else
        echo "$1: found $3, wanted $2 or later"
    fi
}

rust_wanted=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
rust_found=$(cargo --version 2>/dev/null | sed -n 's/^cargo \([0-9.]*\).*/\1/p')
check Rust "$rust_wanted" "$rust_found" "install it with rustup (https://rustup.rs), or run: rustup update stable"

python_found=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null)
check Python 3.9 "$python_found" "on Debian or Ubuntu: apt-get install python3 python3-venv"
if [ -n "$python_found" ]; then
    if "$python" -m pip --version >/dev/null 2>&1; then
        echo "pip: found $("$python" -m pip --version 2>/dev/null | cut -d ' ' -f 2), wanted any"
    elif "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        echo "pip: found none, wanted any: a virtual environment brings its own"
    else
        echo "pip: found neither pip nor venv, wanted one: on Debian or Ubuntu: apt-get install python3-venv" >&2
        failed=1
    fi
fi

# The linker that rustc calls is the C compiler `cc`.
cc_found=$(cc -dumpfullversion -dumpversion 2>/dev/null)
check "C compiler (cc)" 4 "$cc_found" "on Debian or Ubuntu: apt-get install build-essential"

exit "$failed"
