#!/usr/bin/env bash
# mkfs.erofs --tar: a file that GNU tar stored as sparse is left out or replaced by its map, and the image is called complete.
#
# What one would guess: an archive that GNU tar made with --sparse (as is usual for disk images and databases in a root file system)
# gives the same tree as one without, or mkfs.erofs says that it cannot read it. Sparse members are as old as tar on Linux, and
# tar2sqfs, which does for SquashFS what mkfs.erofs does here, expands both kinds of them.
# What happens: a member of GNU's own type "S" is not in the image at all. In the POSIX format, where sparse files are described by
# extended headers, the image has the name that the archive carries for tools that do not know those headers, and as content the list
# of the data's places followed by the data alone. In both cases mkfs.erofs writes nothing to standard error and exits with 0. (OCI
# advises image builders against sparse members, as support for them varies. It does not make them invalid.)
# Seen with: erofs-utils 1.8.6-1 of Debian 13, tar 1.35+dfsg-3.1, squashfs-tools-ng 1.3.2-1; erofs-utils 1.9.4-1 of sid does the same.
# Seen output (the number in the name is tar's process number):
#   gnu: tar2sqfs gives: disk.img, 1048576 bytes, the right content
#   gnu: mkfs.erofs exits with 0 and gives: no file
#   posix: tar2sqfs gives: disk.img, 1048576 bytes, the right content
#   posix: mkfs.erofs exits with 0 and gives: GNUSparseFile.25628/disk.img, 4608 bytes, other content
# Why it matters: layers of images are turned into EROFS by this tool. Whoever does so, or writes a reader of layers, has to handle
# both kinds of sparse member or refuse them: nobody further down can tell that a file is missing.
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
  unpack erofs-utils=1.8.6-1 tar=1.35+dfsg-3.1 squashfs-tools-ng=1.3.2-1
  unshare --mount --net --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root
mkdir -p "$root/work/tree"
in_root() { env -i PATH=/usr/sbin:/usr/bin chroot "$root" "$@"; }

truncate --size=1M "$root/work/tree/disk.img"
printf 'data in the middle' | dd of="$root/work/tree/disk.img" bs=1 seek=524288 conv=notrunc status=none
original=$(sha256sum <"$root/work/tree/disk.img")

# Prints the only file below a directory, its size, and whether it is the file that went into the archive.
describe() {
  local file same="other content"
  file=$(find "$1" -type f)
  if [ -z "$file" ]; then echo "no file"; return; fi
  [ "$(sha256sum <"$file")" != "$original" ] || same="the right content"
  echo "${file#"$1"/}, $(stat -c %s "$file") bytes, $same"
}

expected=yes
for format in gnu posix; do
  in_root tar --format="$format" --sparse -C /work/tree -cf "/work/$format.tar" disk.img
  in_root tar2sqfs -q "/work/$format.sqfs" <"$root/work/$format.tar"
  mkdir "$root/work/$format-sqfs"
  in_root rdsquashfs -q -u / -p "/work/$format-sqfs" "/work/$format.sqfs"
  peer=$(describe "$root/work/$format-sqfs")
  echo "$format: tar2sqfs gives: $peer"

  code=0
  in_root mkfs.erofs --tar=f "/work/$format.erofs" "/work/$format.tar" >/dev/null 2>"$root/work/errors" || code=$?
  in_root fsck.erofs --extract="/work/$format-erofs" "/work/$format.erofs" >/dev/null
  got=$(describe "$root/work/$format-erofs")
  echo "$format: mkfs.erofs exits with $code and gives: $got"

  [ "$peer" = "disk.img, 1048576 bytes, the right content" ] && [ "$code" = 0 ] && [ ! -s "$root/work/errors" ] || expected=no
  case $format:$got in
    "gnu:no file" | posix:GNUSparseFile.*/disk.img,*"other content") ;;
    *) expected=no ;;
  esac
done

if [ "$expected" = yes ]; then
  echo "as described"
else
  echo "CHANGED: mkfs.erofs reads sparse members now, or refuses them"
  exit 1
fi
