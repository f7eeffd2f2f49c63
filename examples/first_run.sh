#!/bin/sh
# The first run: a compiler where there is none, a small real model (98 MB, fetched once), the example
# server compiled from valar.hpp alone, and one question that it posts to itself over HTTP.
set -eu
cd "$(dirname "$0")/.."

need() {  # need COMMAND PACKAGE: names the packages of commands that are missing
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}

missing=
need c++ g++
need python3 python3
python3 -m pip --version >/dev/null 2>&1 || missing="$missing python3-pip"
[ -d /etc/ssl/certs ] || missing="$missing ca-certificates"
if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" != 0 ]; then
        echo "missing:$missing (names of Debian's packages; as root this script installs them)" >&2
        exit 1
    fi
    echo "installing$missing"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

model=$(python3 examples/fetch_model.py)
echo "model: $model"
if [ ! -x server ] || [ -n "$(find valar.hpp examples/server.cpp examples/*.hpp -newer server)" ]; then
    echo "compiling examples/server.cpp, about a minute"
    c++ -std=c++20 -O2 -pthread -I. examples/server.cpp -o server
fi
./server --model "$model" --ask "What is the capital of France?" --temperature 0
