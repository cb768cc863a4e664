# Sets up the linters, and runs them: sh scripts/lint.sh [TOOL…]
#
#   sh scripts/lint.sh             ruff, format, mypy, clang-format, shell, docker and columns, a line each
#   sh scripts/lint.sh ruff mypy   these two
#
# A tool's findings stand below its line. Exit code 0 when all passed, 1 when one found something.
set -eu
needs="lint"
. "$(dirname "$0")/setup.sh"
cd "$root"
failed=0

check() {  # NAME COMMAND…: runs the command, and prints its output where it fails
    name=$1
    shift
    if output=$("$@" 2>&1); then
        say "lint: $name passed"
    else
        printf '%s\n' "lint: $name FAILED" "$output"
        failed=1
    fi
}

sources() {  # the sources that are not Python
    find . -path ./.venv -prune -o -path ./out -prune -o -type f \
        \( -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' "$@" \) -print
}

clang_format() {
    if [ ! -f .clang-format ]; then
        say "lint: clang-format skipped, there is no .clang-format"
        return 0
    fi
    # shellcheck disable=SC2046 # no name of a source has a space in it
    check clang-format clang-format --dry-run --Werror $(sources)
}

# shellcheck disable=SC2329 # called through check
shell_scripts() {
    for script in scripts/*.sh demo/*.sh; do
        sh -n "$script" || return 1
    done
    shellcheck --shell sh --external-sources --source-path SCRIPTDIR scripts/*.sh demo/*.sh
}

# shellcheck disable=SC2329 # called through check
columns() {  # lines of more than 120, some of which clang-format overlooks; of Python ruff says them
    # shellcheck disable=SC2046 # no name of a source has a space in it
    ! LC_ALL=C.UTF-8 grep -nE '^.{121}' $(sources -o -name '*.sh' -o -name '*.toml')
}

[ $# -gt 0 ] || set -- ruff format mypy clang-format shell docker columns
for tool in "$@"; do
    case "$tool" in
    ruff) check ruff ruff check --output-format concise . ;;
    format) check format ruff format --check . ;;
    mypy) check mypy mypy && check mypy-windows mypy --platform win32 && check mypy-macos mypy --platform darwin ;;
    clang-format) clang_format ;;
    shell) check shell shell_scripts ;;
    docker) check docker hadolint Dockerfile ;;
    columns) check columns columns ;;
    *) fail "there is no linter $tool; choose among ruff, format, mypy, clang-format, shell, docker, columns" ;;
    esac
done
exit "$failed"
