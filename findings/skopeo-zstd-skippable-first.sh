#!/usr/bin/env bash
# skopeo copy: a zstd layer that begins with a skippable frame is compressed a second time, and the copy cannot be unpacked.
#
# What one would guess: pzstd, the parallel compressor that comes with zstd, writes ordinary zstd, and a layer of the media type
# "+zstd" that was made with it is copied as it is. If skopeo cannot tell what it is, it copies the bytes and leaves the type alone.
# What happens: pzstd puts a skippable frame before each frame of data, as the format allows. skopeo goes by the first four bytes and
# not by the media type, finds a magic number that it does not know, takes the layer for an uncompressed tar, compresses it with gzip
# and changes the type to "+gzip". The copy has a gzip layer with zstd inside; the layer's diff_id is still the tar's, which nobody
# compares. skopeo exits with 0. A layer that zstd itself compressed is copied as it is.
# Seen with: skopeo 1.18.0+ds1-1+b5 and zstd 1.5.7+dfsg-1 of Debian 13; skopeo 1.22.0+ds1-1 of sid does the same. There, umoci
# 0.6.0+ds-1+b1 unpacks the original and fails at the copy ("read next entry: unexpected EOF").
# Seen output:
#   zstd: begins with 28b52ffd, is +zstd, and has "file"
#   zstd: skopeo copy exits with 0; the copy's layer is +zstd, and uncompressed it is the tar
#   pzstd: begins with 502a4d18, is +zstd, and has "file"
#   pzstd: skopeo copy exits with 0; the copy's layer is +gzip, and uncompressed it is the zstd stream
# Why it matters: a runtime should decide by the media type, or know all sixteen magic numbers of skippable frames (0x184D2A50 to
# 0x184D2A5F) beside that of zstd; and an image that fails only here may have been whole before it was mirrored.
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
  unpack skopeo=1.18.0+ds1-1+b5 zstd=1.5.7+dfsg-1
  unshare --mount --net --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root
mkdir -p "$root/dev" "$root/proc" "$root/work" "$root/tmp" "$root/var/tmp"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
cd "$root/work"
in_root() { env -i PATH=/usr/sbin:/usr/bin HOME=/work chroot "$root" "$@"; }

echo hello >file
tar -cf layer.tar file
in_root zstd -q /work/layer.tar -o /work/zstd.zst
in_root pzstd -q /work/layer.tar -o /work/pzstd.zst

digest() { sha256sum <"$1" | cut -d ' ' -f 1; }
type=application/vnd.oci.image
layout() { # NAME LAYER: an image layout with this one layer
  local blobs=$1/blobs/sha256
  mkdir -p "$blobs"
  blob() { # FILE: puts it into the layout and prints its digest and size as a descriptor has them
    cp "$1" "$blobs/$(digest "$1")"
    echo "\"digest\": \"sha256:$(digest "$1")\", \"size\": $(stat -c %s "$1")"
  }
  echo '{"imageLayoutVersion": "1.0.0"}' >"$1/oci-layout"
  cat >config.json <<EOF
{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ["sha256:$(digest layer.tar)"]}}
EOF
  cat >manifest.json <<EOF
{"schemaVersion": 2, "mediaType": "$type.manifest.v1+json",
 "config": {"mediaType": "$type.config.v1+json", $(blob config.json)},
 "layers": [{"mediaType": "$type.layer.v1.tar+zstd", $(blob "$2")}]}
EOF
  cat >"$1/index.json" <<EOF
{"schemaVersion": 2, "manifests": [{"mediaType": "$type.manifest.v1+json", $(blob manifest.json),
  "annotations": {"org.opencontainers.image.ref.name": "latest"}}]}
EOF
}

for tool in zstd pzstd; do
  layout "$tool-original" "$tool.zst"
  said=$(in_root zstd -q -d -c "/work/$tool.zst" | tar -t)
  echo "$tool: begins with $(od -A n -t x1 -N 4 "$tool.zst" | tr -d ' '), is +zstd, and has \"$said\""
  code=0
  in_root skopeo copy --quiet --insecure-policy "oci:/work/$tool-original:latest" "oci:/work/$tool-copy:latest" || code=$?
  layer=$(grep -h -o 'layer.v1.tar[+a-z]*", *"digest": *"sha256:[0-9a-f]*' "$tool-copy"/blobs/sha256/*)
  compression=${layer%%\"*}
  compression=${compression#layer.v1.tar}
  bytes=$tool-copy/blobs/sha256/${layer##*:}
  case $compression in
    +gzip) gunzip <"$bytes" >content ;;
    +zstd) in_root zstd -q -d -c "/work/$bytes" >content ;;
    *) cp "$bytes" content ;;
  esac
  content="something else"
  if cmp -s content layer.tar; then content="the tar"; fi
  if cmp -s content "$tool.zst"; then content="the zstd stream"; fi
  echo "$tool: skopeo copy exits with $code; the copy's layer is $compression, and uncompressed it is $content"
  result="${result-}$tool:$code:$compression:$content;"
done

if [ "$result" = "zstd:0:+zstd:the tar;pzstd:0:+gzip:the zstd stream;" ]; then
  echo "as described"
else
  echo "CHANGED: skopeo no longer compresses such a layer a second time"
  exit 1
fi
