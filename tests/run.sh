#!/bin/sh
# Builds the library, the examples and the tests, and runs every test that needs no model.
set -eu
cd "$(dirname "$0")/.."

missing=
for pair in c++=g++ cmake=cmake ninja=ninja-build python3=python3; do
    command -v "${pair%%=*}" >/dev/null 2>&1 || missing="$missing ${pair#*=}"
done
echo '#include <doctest/doctest.h>' | c++ -E -x c++ - >/dev/null 2>&1 || missing="$missing doctest-dev"
if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" != 0 ]; then
        echo "missing:$missing (names of Debian's packages; as root this script installs them)" >&2
        exit 1
    fi
    echo "installing$missing"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

cmake --preset release
cmake --build --preset release
ctest --preset release
