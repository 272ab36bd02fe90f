#!/usr/bin/env bash
# fuse-overlayfs: a directory that it replaced has two strange names in it when the kernel's overlayfs mounts the same layers.
#
# What one would guess: fuse-overlayfs uses overlayfs' own marks when it runs as root (device 0/0 for a deleted name, the attribute
# trusted.overlay.opaque for a replaced directory), so that layers written through it can be mounted by the kernel, as container
# engines do when they move from one driver to the other, and look the same.
# What happens: beside the attribute, fuse-overlayfs puts two more marks into the replaced directory: an empty file .wh..wh..opq and a
# device 0/0 named .wh..opq. It hides them itself. The kernel honours the attribute and with it no longer merges the directory, and it
# hides whiteouts in merged directories only. So the file is an ordinary file of the container, and the device is listed and cannot
# be found: find, tar, du and chown -R fail on a tree that nothing is wrong with.
# Seen with: fuse-overlayfs 1.14-1+b1 of Debian 13 (sid has the same version), Linux 6.18.
# Seen output:
#   through fuse-overlayfs the directory has:  new
#   through the kernel's overlayfs it has:     .wh..opq .wh..wh..opq new
#   find there exits with 1 and says:         ‘by-kernel/replaced/.wh..opq’: No such file or directory
# Why it matters: a runtime that takes over upper directories, or makes a layer of one, has to drop both names in an opaque directory.
# More generally, a whiteout in a directory that is not merged is not invisible, so a converter of layers must not leave any there.
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
  unpack fuse-overlayfs=1.14-1+b1
  unshare --mount --net --pid --fork --kill-child --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root

mkdir -p "$root/dev" "$root/proc" "$root/work"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs work "$root/work"
cd "$root/work"
mkdir -p lower/replaced upper scratch scratch-of-kernel by-fuse by-kernel
echo old >lower/replaced/old

layers=lowerdir=/work/lower,upperdir=/work/upper,workdir=/work/scratch
chroot "$root" /usr/bin/fuse-overlayfs -o "$layers" /work/by-fuse >/dev/null 2>errors ||
  { cat errors >&2; echo "fuse-overlayfs cannot mount here" >&2; exit 2; }
rm -r by-fuse/replaced
mkdir by-fuse/replaced
echo new >by-fuse/replaced/new
fuse=$(ls -A by-fuse/replaced | paste -s -d ' ')
echo "through fuse-overlayfs the directory has:  $fuse"
umount by-fuse

mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=scratch-of-kernel by-kernel ||
  { echo "no overlayfs here" >&2; exit 2; }
kernel=$(ls -A by-kernel/replaced 2>/dev/null | paste -s -d ' ')
echo "through the kernel's overlayfs it has:     $kernel"
code=0
find by-kernel -ls >/dev/null 2>errors || code=$?
echo "find there exits with $code and says:         $(sed 's/^find: //' errors)"
umount by-kernel

if [ "$fuse" = new ] && [ "$kernel" = ".wh..opq .wh..wh..opq new" ] && [ "$code" = 1 ] &&
  grep -q 'replaced/.wh..opq.*No such file' errors; then
  echo "as described"
else
  echo "CHANGED: the marks of fuse-overlayfs can no longer be seen through the kernel's overlayfs"
  exit 1
fi
