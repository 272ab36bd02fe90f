#!/usr/bin/env bash
# crun: of two mount options that contradict each other the stricter one wins, where runc and mount(8) take the last.
#
# What one would guess: ["bind", "ro", "rw"] is a writable mount with every OCI runtime, as the last option counts: so it is with
# mount(8), and so it is with runc. Lists like this come from software that appends a user's options to its own defaults.
# What happens: with crun an option that switches something off ("rw", "suid", "exec", "atime") undoes nothing that stands before it.
# The same configuration gives a read-only mount with crun and a writable one with runc, and neither says a word.
# Seen with: crun 1.21-1 and runc 1.1.15+ds1-2+b4 of Debian 13; crun 1.28-1 and runc 1.3.6+ds1-1 of sid do the same.
# Seen output:
#   crun: ro-rw:ro rw-ro:ro noexec-exec:rw,noexec nosuid-suid:rw,nosuid noatime-atime:rw,noatime
#   runc: ro-rw:rw rw-ro:ro noexec-exec:rw nosuid-suid:rw noatime-atime:rw
# Why it matters: a runtime that takes OCI or CRI mounts has to decide which of the two it follows, and software that makes
# configurations should remove the option that it overrides instead of appending the other one.
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
  unpack crun=1.21-1 runc=1.1.15+ds1-2+b4 busybox-static=1:1.37.0-6+b9
  unshare --mount --net --pid --fork --kill-child --propagation private bash "$0" inside "$dir"
  exit
fi
dir=$2
root=$dir/root

# The runtimes need a root of their own that is a mount, with /proc of this PID namespace and the machine's cgroups in it.
mount --bind "$root" "$root"
mkdir -p "$root"/{dev,proc,sys,run,old} "$root"/bundle/rootfs/{bin,proc,dev,ro-rw,rw-ro,noexec-exec,nosuid-suid,noatime-atime}
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount --make-rprivate "$root/sys"
# crun refuses machines that have cgroups of both versions at work.
if [ -d "$root/sys/fs/cgroup/unified" ]; then umount "$root/sys/fs/cgroup/unified"; fi
mount -t proc proc "$root/proc"
mount -t tmpfs run "$root/run"
cp "$root/usr/bin/busybox" "$root/bundle/rootfs/bin/busybox"

bind() { echo "{\"destination\": \"/$1\", \"type\": \"bind\", \"source\": \"/run\", \"options\": [\"bind\", \"${1%-*}\", \"${1#*-}\"]}"; }
cat >"$root/bundle/config.json" <<EOF
{"ociVersion": "1.0.2", "root": {"path": "rootfs"},
 "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["/bin/busybox", "cat", "/proc/self/mountinfo"]},
 "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}]},
 "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
  {"destination": "/dev", "type": "tmpfs", "source": "dev"},
  $(bind ro-rw), $(bind rw-ro), $(bind noexec-exec), $(bind nosuid-suid), $(bind noatime-atime)]}
EOF

# Prints the options that the mounts in question have in a container of this runtime, as "mount point:options" in one line.
options() {
  local id=finding-${dir##*.}-$1
  env -i PATH=/usr/sbin:/usr/bin chroot "$root" "$1" --root "/run/$1" run --bundle /bundle "$id" </dev/null >"$root/said" 2>&1 ||
    { cat "$root/said" >&2; echo "$1 cannot run a container here" >&2; exit 2; }
  awk '$5 ~ /-/ { sub(",relatime", "", $6); print substr($5, 2) ":" $6 }' "$root/said" | paste -s -d ' '
}
crun=$(options crun)
runc=$(options runc)
echo "crun: $crun"
echo "runc: $runc"

if [ "$runc" = "ro-rw:rw rw-ro:ro noexec-exec:rw nosuid-suid:rw noatime-atime:rw" ] &&
  [ "$crun" = "ro-rw:ro rw-ro:ro noexec-exec:rw,noexec nosuid-suid:rw,nosuid noatime-atime:rw,noatime" ]; then
  echo "as described"
else
  echo "CHANGED: crun and runc no longer differ in this way"
  exit 1
fi
