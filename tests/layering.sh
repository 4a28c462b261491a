#!/usr/bin/env bash
# Includes point one way only: launch -> runtime -> sharding -> kernels. Public headers stay free
# of the transports' and of HDF5's headers. Usage: layering.sh SOURCE_DIR
cd "$1" || exit 2
failures=0
refuse() {  # refuse REASON PATTERN FOLDERS... (--include options first)
  local reason=$1 pattern=$2; shift 2
  if grep -rnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($pattern)" "$@"; then
    echo "layering: $reason"; failures=1
  fi
}
refuse "kernels includes from above" "(sharding|runtime|launch)/" kernels
refuse "sharding includes from above" "(runtime|launch)/" sharding
refuse "runtime includes from above" "launch/" runtime
refuse "a library includes test code" "(tests/|gtest|gmock)" kernels sharding runtime launch
refuse "kernels or sharding knows ranks or files" "(mpi|nccl|hdf5|H5[A-Za-z]*)\.h" kernels sharding
refuse "sharding knows a device" "cuda" sharding
refuse "a public header includes a transport, device or file header" \
  "(mpi|nccl|cudnn|hdf5|H5[A-Za-z]*|cuda[A-Za-z_]*)\.h" --include=*.hpp \
  --exclude=peer_*.hpp --exclude-dir=cuda --exclude-dir=sm90 --exclude-dir=cudnn kernels sharding runtime
exit $failures
