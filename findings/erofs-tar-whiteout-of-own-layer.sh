#!/usr/bin/env bash
# mkfs.erofs --tar --aufs: a whiteout deletes what its own layer brings, or fails to delete what lies below.
#
# What one would guess: --aufs turns the whiteouts of an OCI layer (".wh.NAME") into those of overlayfs, and an overlay of the images
# shows the tree that other tools unpack. OCI's rule is that a whiteout deletes from the layers below and never from its own. It asks
# builders to put whiteouts first, but the order changes nothing.
# What happens: the whiteout becomes a member called NAME, and of two members with one name the last one counts. If the layer replaces
# a file and its whiteout comes after it, the new file is gone. If the whiteout comes first and a directory of the name follows, the
# directory is not marked opaque, and all that was below shows through it again.
# Seen with: erofs-utils 1.8.6-1 and umoci 0.4.7+ds-4+b10 of Debian 13, Linux 6.18; erofs-utils 1.9.4-1 and umoci 0.6.0+ds-1+b1 of sid
# do the same.
# Seen output:
#   umoci unpack:                  directory/new file
#   mkfs.erofs --aufs, overlayfs:  directory/new directory/old
# Why it matters: a snapshotter that converts layers with this tool starts containers with files that were deleted and without files
# that are there. A converter has to look at a layer's whiteouts and its own names together before it writes either.
set -eu

# Unpacks packages of Debian 13, each given as NAME=VERSION, and what they depend on into $dir/root. The machine itself gets
# nothing installed. Ends with 2 if a version is not to be had, which says nothing about the behaviour.
unpack() {
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror deb
  mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial" "$dir/root"
  touch "$dir/apt/status"
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
  [ -n "$mirror" ] || { echo "apt knows no archive of Debian yet: run apt-get update once" >&2; exit 2; }
  echo "deb [signed-by=$keyring] $mirror trixie main" >"$dir/apt/sources"
  cat >"$dir/apt/conf" <<EOF
Dir::Etc { SourceList "$dir/apt/sources"; SourceParts "/dev/null"; Preferences "/dev/null"; PreferencesParts "/dev/null"; }
Dir::State "$dir/apt"; Dir::State::status "$dir/apt/status"; Dir::Cache "$dir/apt";
APT { Sandbox::User "root"; Install-Recommends "false"; }
EOF
  export APT_CONFIG=$dir/apt/conf
  if ! apt-get -qq update || ! apt-get -qq --yes --download-only install "$@" >/dev/null; then
    echo "cannot fetch $*" >&2
    exit 2
  fi
  mkdir -p "$dir/root/usr/bin" "$dir/root/usr/sbin" "$dir/root/usr/lib64"
  ln -s usr/bin usr/sbin usr/lib usr/lib64 "$dir/root"
  for deb in "$dir"/apt/archives/*.deb; do dpkg -x "$deb" "$dir/root"; done
}

if [ "${1-}" != inside ]; then
  dir=$(mktemp -d)
  trap 'rm -rf --one-file-system "$dir"' EXIT
  unpack erofs-utils=1.8.6-1 umoci=0.4.7+ds-4+b10
  unshare --mount --net --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root
mkdir -p "$root/dev" "$root/proc" "$root/work"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs work "$root/work"
cd "$root/work"
in_root() { env -i PATH=/usr/sbin:/usr/bin HOME=/work chroot "$root" "$@"; }

# Two layers. The upper one replaces a file and a directory, each with a whiteout for what was there before.
mkdir -p lower/directory upper/directory
echo old >lower/file
echo old >lower/directory/old
echo new >upper/file
echo new >upper/directory/new
touch upper/.wh.file upper/.wh.directory
tar -C lower -cf lower.tar --no-recursion file directory directory/old
tar -C upper -cf upper.tar --no-recursion file .wh.file .wh.directory directory directory/new

# What umoci makes of them: an image layout, unpacked.
mkdir -p layout/blobs/sha256
blob() { # FILE: puts it into the layout and prints its digest and size as a descriptor has them
  local digest
  digest=$(sha256sum <"$1" | cut -d ' ' -f 1)
  cp "$1" "layout/blobs/sha256/$digest"
  echo "\"digest\": \"sha256:$digest\", \"size\": $(stat -c %s "$1")"
}
type=application/vnd.oci.image
lower=$(blob lower.tar)
upper=$(blob upper.tar)
ids=$(printf '%s\n' "$lower" "$upper" | grep -o '"sha256:[0-9a-f]*"' | paste -s -d ,)
echo "{\"architecture\": \"amd64\", \"os\": \"linux\", \"rootfs\": {\"type\": \"layers\", \"diff_ids\": [$ids]}}" >config.json
echo "{\"schemaVersion\": 2, \"config\": {\"mediaType\": \"$type.config.v1+json\", $(blob config.json)}, \"layers\": [
  {\"mediaType\": \"$type.layer.v1.tar\", $lower}, {\"mediaType\": \"$type.layer.v1.tar\", $upper}]}" >manifest.json
echo "{\"schemaVersion\": 2, \"manifests\": [{\"mediaType\": \"$type.manifest.v1+json\", $(blob manifest.json),
  \"annotations\": {\"org.opencontainers.image.ref.name\": \"latest\"}}]}" >layout/index.json
echo '{"imageLayoutVersion": "1.0.0"}' >layout/oci-layout
in_root umoci unpack --image /work/layout:latest /work/bundle >/dev/null 2>errors || { cat errors >&2; exit 2; }

# What mkfs.erofs makes of them: two images, laid over each other by the kernel.
for layer in lower upper; do
  in_root mkfs.erofs --quiet --tar=f --aufs "/work/$layer.erofs" "/work/$layer.tar"
  mkdir "$layer-erofs"
  mount -t erofs -o ro,loop "$layer.erofs" "$layer-erofs" || { echo "no EROFS here" >&2; exit 2; }
done
mkdir overlay
mount -t overlay overlay -o ro,lowerdir=upper-erofs:lower-erofs overlay || { echo "no overlayfs here" >&2; exit 2; }

names() { (cd "$1" && find . -type f | sed 's/^..//' | sort | paste -s -d ' '); }
umoci=$(names bundle/rootfs)
erofs=$(names overlay)
echo "umoci unpack:                  $umoci"
echo "mkfs.erofs --aufs, overlayfs:  $erofs"

if [ "$umoci" = "directory/new file" ] && [ "$erofs" = "directory/new directory/old" ]; then
  echo "as described"
else
  echo "CHANGED: mkfs.erofs no longer lets whiteouts and names of one layer replace each other"
  exit 1
fi
