# Sourced by the scripts beside it: makes .venv and installs a requirements file into it, once.
# PYTHON=python3.13 picks the interpreter; a changed requirements file installs again.

# Huge pages for large buffers: on CPUs a training step otherwise spends a tenth to a quarter of its
# time on having fresh pages of its temporary memory zeroed (experiments/results/speed).
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}

make_environment() {
  local requirements=$1
  local python=${PYTHON:-}
  if [ -z "$python" ]; then
    for candidate in python3 python3.11 python3.12 python3.13; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
      fi
    done
  fi
  if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: PYTHON=${PYTHON:-python3} is not Python 3.11 or newer: set PYTHON to one that is" >&2
    exit 2
  fi
  local version stamp
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  stamp=".venv/.$(basename "$requirements").installed"
  if [ -x .venv/bin/python ] && [ "$(cat .venv/.python 2>/dev/null)" != "$version" ]; then
    echo "replacing .venv (it is not Python $version)"
    rm -rf .venv
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "$version" >.venv/.python
  if [ "$(cat "$stamp" 2>/dev/null)" != "$(cat requirements*.txt | cksum)" ]; then
    echo "installing $requirements (about two minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    if [ "$requirements" = requirements-test.txt ]; then
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        --upgrade --target .venv/alone -r requirements-alone.txt
      # Whether it loads beside a CPU torch depends on the interpreter; no test needs it.
      rm -f .venv/alone/torchvision/*.so
    fi
    cat requirements*.txt | cksum >"$stamp"
  fi
}

# One sentence on stderr, status 2.
refuse() {
  echo "error: $*" >&2
  exit 2
}

whole_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || refuse "--$1=$2 is not a whole number above 0"
}

# Words as a shell would read them back, on one line.
quoted() {
  local line="" word
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./=:,@%+-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}
