#!/usr/bin/env bash
# Uses the wheel as a stranger would: in a bare environment of another Python than the one that built it.
#
#   tools/test_wheel.sh BUILDING_PYTHON WHEEL SOURCE_ARCHIVE
#
# WHEEL_PYTHON names that other Python (left out: the newest of 3.13, 3.12, 3.14, 3.10 that is there and is not the
# builder's version); TORCH the torch it gets. Off a release's own file for one Python, pip takes torch for another from
# the package index: the CUDA build, about 3 GB, 5 GB unpacked, which is removed again. So this also shows that the
# wheel works beside a torch with CUDA on a machine without.
set -euo pipefail
builder=$(realpath -s "$1") wheel=$(realpath "$2") archive=$(realpath "$3")
torch=${TORCH:-torch==2.13.0}
tools=$(dirname "$(realpath "$0")")

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
other=${WHEEL_PYTHON:-}
if [ -z "$other" ]; then
  for name in 3.13 3.12 3.14 3.10; do
    for candidate in "python$name" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$name".*/bin/python; do
      if [ "$(version_of "$candidate")" = "$name" ] && [ "$name" != "$(version_of "$builder")" ]; then
        other=$candidate
        break 2
      fi
    done
  done
fi
if [ -z "$other" ]; then
  echo "no other Python than $(version_of "$builder") was found: using that one again (WHEEL_PYTHON names another)"
  other=$builder
fi

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
cd "$room"  # away from the checkout, whose folder python/ must not help

echo "Without torch, a build from source says so in two lines"
"$other" -m venv bare
if bare/bin/pip --disable-pip-version-check wheel --no-deps --wheel-dir out "$archive" >bare.log 2>&1; then
  echo "the build passed without torch"
  exit 1
fi
for line in "fastmoe_route needs the headers of torch >= 2.10 to build, and this Python has none." \
  "Install torch and build with --no-build-isolation, or set FASTMOE_ROUTE_TORCH_DIR="; do
  grep -F "$line" bare.log || { cat bare.log; exit 1; }
done

echo "Installing $(basename "$wheel") and $torch for $("$other" --version)"
bare/bin/pip --disable-pip-version-check -qq install --no-cache-dir "$torch" "$wheel"
bare/bin/python -W ignore "$tools/try_wheel.py"
