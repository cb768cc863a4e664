# The main job, with the bundled RWKV-7 as its demo: sh scripts/bone_rwkv7.sh --help (bone.sh is its body).
set -eu
demo_base=demo/rwkv7-demo.pth demo_folder=out/demo-rwkv7
. "$(dirname "$0")/bone.sh"
