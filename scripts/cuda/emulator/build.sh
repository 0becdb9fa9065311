#!/usr/bin/env bash
# Builds the emulator: libcuda.so.1 and its companions, which compute on the host.
#
#   scripts/cuda/emulator/build.sh DIR
#
# Needs a C++20 compiler, the toolkit's headers (CUDA_HOME, as scripts/cuda/toolchain.sh sets it), candle's kernels in
# cargo's registry, and a Python with a shared library and Triton (scripts/kernels/setup_env.sh; QWEN_LORA_KERNELS_ENV).
set -euo pipefail

[ $# = 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
toolkit=${CUDA_HOME:?the toolkit of scripts/cuda/toolchain.sh}
python=${QWEN_LORA_KERNELS_ENV:?an environment made by scripts/kernels/setup_env.sh}/bin/python

# The version that the program was built with.
version=$(sed -n '/^name = "candle-kernels"/{n;s/version = "\(.*\)"/\1/p}' "$root/Cargo.lock")
candle=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"candle-kernels-$version/src" | head -1)
include="-I$toolkit/include -I$toolkit/include/cccl"
compile() { "${CXX:-g++}" -c -O2 -fPIC -ffp-contract=off -fno-strict-aliasing "$@"; }

cd "$out"
objects=()
for name in affine binary cast fill indexing reduce ternary unary; do
  # Threads take turns, so that what a block shares is a variable that stays.
  sed -e 's/extern *__shared__/extern/; s/__shared__/static/' "$candle/$name.cu" >"$name.cpp"
  compile -std=c++17 -w -include "$here/cuda_on_host.h" "-I$candle" $include "$name.cpp" -o "$name.o" &
  objects+=("$name.o")
  [ ${#objects[@]} = 4 ] && wait
done
wait
# Helpers that all of them include are there many times, all the same.
"${CXX:-g++}" -shared "${objects[@]}" -Wl,-z,muldefs -o libcandle_on_host.so

config() { "$python" -c "import sysconfig; print(sysconfig.get_config_var('$1'))"; }
for name in driver memory streams kernels threads libraries triton; do
  compile -std=c++20 -Wall $include "-I$(config INCLUDEPY)" "$here/$name.cpp" -o "emulator-$name.o"
done
# The toolkit's libraries carry their name as a version, which programs linked with them ask for.
printf 'libcublas.so.13 { cublas*; };\nlibcurand.so.10 { curand*; };\n' >versions
"${CXX:-g++}" -shared emulator-*.o -Wl,--version-script=versions -Wl,-soname,libcuda.so.1 -o libcuda.so.1 \
  "-L$(config LIBDIR)" "-Wl,-rpath,$(config LIBDIR)" "-lpython$(config py_version_short)" -ldl
ln -sf libcuda.so.1 libcublas.so.13
ln -sf libcuda.so.1 libcurand.so.10
cp -L "$toolkit"/lib/libcudart.so.13 .
cat >settings <<SETTINGS
export LD_LIBRARY_PATH='$out'\${LD_LIBRARY_PATH:+:"\$LD_LIBRARY_PATH"}
export EMULATOR_CANDLE='$out/libcandle_on_host.so'
export PYTHONHOME='$("$python" -c 'import sys; print(sys.base_prefix)')'
export PYTHONPATH='$here:$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')'
SETTINGS
echo "built; to use it: source $out/settings"
