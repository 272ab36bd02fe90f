#!/usr/bin/env bash
# CNI's portmap: DEL without the port mappings succeeds and removes nothing.
#
# What one would guess: DEL names the container, and the rules that ADD made are tagged with the container, so DEL finds them whether
# or not the caller still knows the mappings; a DEL that cannot do its work says so.
# What happens: DEL without runtimeConfig.portMappings exits with 0 at once and leaves every rule. A DEL with any mapping, even one
# that ADD was never given, finds the rules by the container and removes all of them. Until then the port on the host leads to an
# address that the address plugin has given to somebody else, and since the stale rule is older than a new pod's rule for the same
# port, it is the stale one that the kernel follows.
# Seen with: containernetworking-plugins 1.1.1+ds1-3+b17 of Debian 13 with iptables 1.8.11-2; version 1.9.1+ds1-1 of sid does the same.
# Seen output:
#   ADD of the pod at 10.9.0.2: 3 rules
#   DEL of it without mappings: exit code 0, 3 rules
#   the next pod with port 8080 is at 10.9.0.3; a connection to port 8080 goes to 10.9.0.2
#   DEL of the first pod with a mapping that it never had: exit code 0, 0 rules
# Why it matters: a runtime that tears a pod down from a damaged or partial record believes that the network is clean. It has to keep
# the mappings, or to pass a made-up one with every DEL.
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

ip link set lo up
ip address add 10.9.0.1/24 dev lo # the host; the pods need not exist, as only the way of the first packet is looked at
mkdir -p "$root/dev" "$root/proc" "$root/run"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
ln -sf xtables-nft-multi "$root/usr/sbin/iptables"
ln -sf xtables-nft-multi "$root/usr/sbin/ip6tables"
touch "$root/run/netns"
unshare --net="$root/run/netns" true

portmap() { # COMMAND POD ADDRESS RUNTIME_CONFIG
  env -i PATH=/usr/sbin:/usr/bin CNI_COMMAND="$1" CNI_CONTAINERID="$2" CNI_NETNS=/run/netns CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni \
    chroot "$root" /usr/lib/cni/portmap <<EOF
{"cniVersion": "1.0.0", "name": "pods", "type": "portmap", "capabilities": {"portMappings": true}, "runtimeConfig": $4,
 "prevResult": {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/run/netns"}],
                "ips": [{"interface": 0, "address": "$3/24", "gateway": "10.9.0.1"}]}}
EOF
}
add() { # POD ADDRESS: with port 8080 of the host
  local said
  said=$(portmap ADD "$1" "$2" "$web") || { echo "ADD of $1 failed: $said" >&2; exit 2; }
}
rules() { chroot "$root" /usr/sbin/iptables --wait -t nat -S | grep -c 'CNI-DN.* -j \(DNAT\|CNI-HOSTPORT-SETMARK\)' || true; }
# How many first packets of connections were sent on to this address.
led_to() { chroot "$root" /usr/sbin/iptables --wait -t nat -n -v -x -L | awk -v to="to:$1:80" '$NF == to { n += $1 } END { print n + 0 }'; }

web='{"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}'
other='{"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "tcp"}]}'

add first 10.9.0.2
added=$(rules)
echo "ADD of the pod at 10.9.0.2: $added rules"

code=0
portmap DEL first 10.9.0.2 '{}' || code=$?
kept=$(rules)
echo "DEL of it without mappings: exit code $code, $kept rules"

add next 10.9.0.3
timeout 2 bash -c ': </dev/tcp/10.9.0.1/8080' 2>/dev/null || true
stale=$(led_to 10.9.0.2)
fresh=$(led_to 10.9.0.3)
winner="nowhere"
[ "$fresh" = 0 ] || winner=10.9.0.3
[ "$stale" = 0 ] || winner=10.9.0.2
echo "the next pod with port 8080 is at 10.9.0.3; a connection to port 8080 goes to $winner"

portmap DEL next 10.9.0.3 "$web"
last=0
portmap DEL first 10.9.0.2 "$other" || last=$?
left=$(rules)
echo "DEL of the first pod with a mapping that it never had: exit code $last, $left rules"

if [ "$added" -gt 0 ] && [ "$code" = 0 ] && [ "$kept" = "$added" ] && [ "$winner" = 10.9.0.2 ] && [ "$last" = 0 ] && [ "$left" = 0 ]; then
  echo "as described"
else
  echo "CHANGED: a DEL without mappings no longer leaves all the rules of its pod, or they no longer win"
  exit 1
fi
