#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0.
#
# `--dist loadgroup` keeps no group together: tests with the same xdist_group mark run on different workers, and nothing is
# said. xdist appends the group's name to the private attribute _nodeid of each item (xdist/remote.py), and its scheduler
# reads it from nodeid. pytest 9.2 has no such attribute any more, so that the assignment goes nowhere. With pytest 9.1.1
# the same command keeps the group on one worker.
#
# Expected: eight tests of one group on one worker, or an error.
# Seen:     on two workers with pytest 9.2.0, on one with 9.1.1.
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > test_group.py <<'EOF'
import time

import pytest

together = pytest.mark.xdist_group("one")


@together
@pytest.mark.parametrize("i", range(8))
def test_in_group(i):
    time.sleep(0.2)


@pytest.mark.parametrize("i", range(2))
def test_alone(i):
    time.sleep(0.2)
EOF
workers() {
  python3 -m venv "venv-$1"
  "venv-$1/bin/pip" --disable-pip-version-check -q install "pytest==$1" pytest-xdist==3.8.0
  "venv-$1/bin/python" -m pytest -p no:cacheprovider -n 2 --dist loadgroup -v test_group.py |
    sed -n 's/^\[\(gw[01]\)\].*PASSED.*test_in_group.*/\1/p' | sort | uniq -c | tr -s ' \n' ' '
}
new=$(workers 9.2.0)
old=$(workers 9.1.1)
echo "tests of the group on each worker, pytest 9.2.0:$new"
echo "tests of the group on each worker, pytest 9.1.1:$old"
case $new in *gw0*gw1*) ;; *) echo "changed: the group stays together"; exit 1 ;; esac
case $old in *gw0*gw1*) echo "changed: the group is split by pytest 9.1.1 too"; exit 1 ;; esac
