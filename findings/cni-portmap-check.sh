#!/usr/bin/env bash
# CNI's portmap 1.1.1: CHECK fails right after a successful ADD, on any machine where ip6tables works.
#
# What one would guess: CHECK with the configuration and the result that ADD was just given says that all is well, as long as nobody
# touched the rules.
# What happens: CHECK looks for the pod's rules in the tables of both IP versions. For a pod with an IPv4 address only, ADD made none
# in ip6tables, and CHECK fails with "could not check ipv6 dnat". The port mapping works meanwhile. Where ip6tables is missing, CHECK
# does not look there and succeeds.
# Seen with: containernetworking-plugins 1.1.1+ds1-3+b17 of Debian 13 (Debian 12 has 1.1.1 as well) with iptables 1.8.11-2; mended in
# 1.9.1+ds1-1 of sid.
# Seen output:
#   ADD:                      exit code 0
#   CHECK without ip6tables:  exit code 0
#   CHECK with ip6tables:     exit code 1, could not check ipv6 dnat: chain CNI-DN-920376a55b5f842a4ca84 not found in iptables table nat
#   DEL:                      exit code 0
# Why it matters: a runtime that asks CHECK, for example after a restart, is told that every pod with a host port is broken. With these
# plugins a failed CHECK of portmap proves nothing, and to rebuild pods because of it would end healthy ones.
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
  unpack containernetworking-plugins=1.1.1+ds1-3+b17 iptables=1.8.11-2
  unshare --mount --net --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root

mkdir -p "$root/dev" "$root/proc" "$root/run"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
ln -sf xtables-nft-multi "$root/usr/sbin/iptables"
touch "$root/run/netns"
unshare --net="$root/run/netns" true

portmap() { # COMMAND
  env -i PATH=/usr/sbin:/usr/bin CNI_COMMAND="$1" CNI_CONTAINERID=pod CNI_NETNS=/run/netns CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni \
    chroot "$root" /usr/lib/cni/portmap <<'EOF'
{"cniVersion": "1.0.0", "name": "pods", "type": "portmap", "capabilities": {"portMappings": true},
 "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
 "prevResult": {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/run/netns"}],
                "ips": [{"interface": 0, "address": "10.9.0.2/24", "gateway": "10.9.0.1"}]}}
EOF
}
try() { # COMMAND: prints its exit code and message
  local code=0 said
  said=$(portmap "$1") || code=$?
  echo "$code$(echo "$said" | sed -n 's/.*"msg": "\(.*\)".*/, \1/p')"
}

chroot "$root" /usr/sbin/xtables-nft-multi ip6tables -t nat -S >/dev/null || { echo "ip6tables does not work here" >&2; exit 2; }
added=$(try ADD)
without=$(try CHECK)
ln -sf xtables-nft-multi "$root/usr/sbin/ip6tables"
with=$(try CHECK)
removed=$(try DEL)
echo "ADD:                      exit code $added"
echo "CHECK without ip6tables:  exit code $without"
echo "CHECK with ip6tables:     exit code $with"
echo "DEL:                      exit code $removed"

case "$added;$without;$with;$removed" in
  "0;0;1, could not check ipv6 dnat"*";0") echo "as described" ;;
  *)
    echo "CHANGED: CHECK after ADD no longer depends on whether ip6tables works"
    exit 1
    ;;
esac
