# Writes requirements.lock anew, by uv from the package index: sh scripts/lock.sh
#
# Of torch it has the newest tested version alone, because torch's builds (CPU, CUDA 12.6, …) differ in their hashes and
# in the libraries that they bring.
set -eu
. "$(dirname "$0")/setup.sh"
cd "$root"
torch=2.13.0
{
    echo "# The tested versions of requirements.txt and of all extras, with hashes, which sh scripts/lock.sh writes. Of"
    echo "# torch, whose build and CUDA libraries suit the machine, it is the newest one."
    echo "torch<=$torch"
    echo "torch==$torch" | UV_CONSTRAINT="" UV_FIND_LINKS="" uv pip compile --quiet --universal --python-version 3.10 \
        --all-extras --generate-hashes --no-annotate --no-header --no-emit-index-url --constraint /dev/stdin \
        pyproject.toml | awk '/^[a-z]/ { ours = !/^(torch==|triton==|nvidia-|cuda-)/ } ours'
} >requirements.lock.new
mv requirements.lock.new requirements.lock
