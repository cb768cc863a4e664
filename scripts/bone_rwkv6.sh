# The main job, with the bundled RWKV-6 as its demo: sh scripts/bone_rwkv6.sh --help (bone.sh is its body).
set -eu
demo_base=demo/rwkv6-demo.pth demo_folder=out/demo
. "$(dirname "$0")/bone.sh"
