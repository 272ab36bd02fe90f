#!/usr/bin/env bash
# One image layout, one name, three tools: skopeo takes the first image, oras the last, and umoci refuses.
#
# What one would guess: "latest" of a layout on disk is one image, whoever reads it, or all of them call the layout bad. Two entries of
# one name in index.json are easily come by: a builder that appends its entry does it with every build, and the specification of image
# layouts does not forbid it.
# What happens: skopeo takes the entry that comes first, oras the one that comes last, and umoci says that the name is ambiguous. The
# first two say nothing. So what is tested with one tool is not what another one pushes.
# Seen with: skopeo 1.18.0+ds1-1+b5, oras 1.2.0-1+b9, umoci 0.4.7+ds-4+b10 of Debian 13; skopeo 1.22.0+ds1-1, oras 1.3.3-1 and umoci
# 0.6.0+ds-1+b1 of sid do the same.
# Seen output:
#   skopeo inspect:       first
#   oras manifest fetch:  last
#   umoci stat:           tag is ambiguous: latest
# Why it matters: a runtime that reads layouts has to choose, and can agree with only one of them. To refuse, and to name both digests,
# is the choice that surprises nobody later.
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
  unpack skopeo=1.18.0+ds1-1+b5 oras=1.2.0-1+b9 umoci=0.4.7+ds-4+b10
  unshare --mount --net --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root
mkdir -p "$root/dev" "$root/proc" "$root/work" "$root/tmp" "$root/var/tmp"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
cd "$root/work"
in_root() { env -i PATH=/usr/sbin:/usr/bin HOME=/work chroot "$root" "$@"; }

# A layout with two images that differ in a label, both under the name "latest".
mkdir -p layout/blobs/sha256
type=application/vnd.oci.image
blob() { # FILE: puts it into the layout and prints its digest and size as a descriptor has them
  local digest
  digest=$(sha256sum <"$1" | cut -d ' ' -f 1)
  cp "$1" "layout/blobs/sha256/$digest"
  echo "\"digest\": \"sha256:$digest\", \"size\": $(stat -c %s "$1")"
}
entry() { # LABEL: makes an image and prints its entry for index.json
  cat >config.json <<EOF
{"architecture": "amd64", "os": "linux", "config": {"Labels": {"image": "$1"}}, "rootfs": {"type": "layers", "diff_ids": []}}
EOF
  cat >manifest.json <<EOF
{"schemaVersion": 2, "mediaType": "$type.manifest.v1+json",
 "config": {"mediaType": "$type.config.v1+json", $(blob config.json)}, "layers": []}
EOF
  echo "{\"mediaType\": \"$type.manifest.v1+json\", $(blob manifest.json),"
  echo " \"annotations\": {\"org.opencontainers.image.ref.name\": \"latest\"}}"
}
first=$(entry first)
last=$(entry last)
echo "{\"schemaVersion\": 2, \"manifests\": [$first, $last]}" >layout/index.json
echo '{"imageLayoutVersion": "1.0.0"}' >layout/oci-layout

label() { grep -o '"image": *"[a-z]*"' | grep -o 'first\|last' || echo nothing; }
skopeo=$(in_root skopeo inspect --config oci:/work/layout:latest | label)
oras=$(in_root oras manifest fetch-config --oci-layout /work/layout:latest | label)
umoci=$(in_root umoci stat --image /work/layout:latest 2>&1 | grep -o 'tag is ambiguous.*[a-z]' || echo nothing)
echo "skopeo inspect:       $skopeo"
echo "oras manifest fetch:  $oras"
echo "umoci stat:           $umoci"

if [ "$skopeo" = first ] && [ "$oras" = last ] && [ "$umoci" = "tag is ambiguous: latest" ]; then
  echo "as described"
else
  echo "CHANGED: the three tools no longer choose the first, the last and none"
  exit 1
fi
