# Sourced by the scripts for a machine with a GPU and no network, in the repository's root: puts a carried Bun, its modules and a built
# library in place. Sets `work`, a folder that goes when the script ends, and `bun`.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

unpack() { # FILE DEST: a copy, unpacked where it is .xz
  case $1 in
    *.xz) python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$1" "$2" ;;
    *) [ "$(realpath "$1")" = "$(realpath -m "$2")" ] || cp "$1" "$2" ;;
  esac
}

setup() { # BUN MODULES [LIBRARY]
  unpack "$1" "$work/bun" && chmod +x "$work/bun" && bun=$work/bun || exit 2
  if [ ! -e node_modules ]; then
    if [ -d "$2" ]; then ln -s "$(realpath "$2")" node_modules; else tar -xzf "$2"; fi
  fi
  [ -z "${3:-}" ] || { mkdir -p dist/native/linux-x64 && unpack "$3" dist/native/linux-x64/libfreekv_cuda.so; } || exit 2
}
