#!/usr/bin/env bash
# CNI's bandwidth plugin: a large burst at a low rate becomes a queue of minutes, or a limit that no packet passes.
#
# What one would guess: the burst is a number of bits, up to 2^32-1 of them, and asking for the largest is how a caller says that it
# wants none of its own (Kubernetes knows a rate only, and container runtimes fill in that number). Any rate goes with any burst.
# What happens: the plugin has to tell the kernel how long the burst takes at the rate, in ticks of 64 ns and in 32 bits. That
# overflows when burst / rate is more than about 275 seconds, which with the largest burst is every rate below 15.625 Mbit/s. ADD
# succeeds, and the token bucket has some other burst, and a queue that holds back packets for minutes before it drops one. At
# 7,812,500 bit/s the burst that is left is smaller than a packet: every larger one is dropped, for ever.
# Seen with: containernetworking-plugins 1.1.1+ds1-3+b17 of Debian 13 with iproute2 6.15.0-1; 1.9.1+ds1-1 of sid does the same.
# Seen output:
#   asked for 16000000 bit/s and a burst of 536870911 bytes: a burst of 536870909 bytes, a queue of up to 0 s
#   asked for 15000000 bit/s and a burst of 536870911 bytes: a burst of 21474834 bytes, a queue of up to 275 s
#   asked for 10000000 bit/s and a burst of 536870911 bytes: a burst of 193273526 bytes, a queue of up to 275 s
#   asked for 1000000 bit/s and a burst of 536870911 bytes: a burst of 21474835 bytes, a queue of up to 4123 s
#   asked for 7812500 bit/s and the same burst: a burst of 273 bytes, and of 5 packets of 1000 bytes 5 were dropped
# Why it matters: a runtime that passes a pod's bandwidth on should ask for a burst of some seconds of the rate. The pod starts and
# looks healthy otherwise: only its transfers are slow beyond all measure, as nothing tells the senders to slow down.
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
  unpack containernetworking-plugins=1.1.1+ds1-3+b17 iproute2=6.15.0-1
  unshare --mount --net --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root

mkdir -p "$root/dev" "$root/proc" "$root/run"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
touch "$root/run/netns"
unshare --net="$root/run/netns" true
in_root() { env -i PATH=/usr/sbin:/usr/bin chroot "$root" "$@"; }
in_root ip link add host0 type veth peer name eth0
in_root ip link set eth0 netns /run/netns
in_root ip address add 10.9.0.1/24 dev host0
in_root ip link set host0 up
nsenter --net="$root/run/netns" chroot "$root" /usr/sbin/ip address add 10.9.0.2/24 dev eth0
nsenter --net="$root/run/netns" chroot "$root" /usr/sbin/ip link set eth0 up

# Prints the burst in bytes and the longest wait in the queue in seconds that a pod gets whose caller asks for this rate in bit/s.
limits() {
  local said
  in_root tc qdisc del dev host0 root 2>/dev/null || true
  said=$(env -i CNI_COMMAND=ADD CNI_CONTAINERID=pod CNI_NETNS=/run/netns CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni PATH=/usr/sbin:/usr/bin \
    chroot "$root" /usr/lib/cni/bandwidth <<EOF
{"cniVersion": "1.0.0", "name": "pods", "type": "bandwidth", "ingressRate": $1, "ingressBurst": 4294967295,
 "prevResult": {"cniVersion": "1.0.0", "ips": [{"interface": 1, "address": "10.9.0.2/24"}],
                "interfaces": [{"name": "host0"}, {"name": "eth0", "sandbox": "/run/netns"}]}}
EOF
  ) || { echo "ADD failed: $said" >&2; exit 2; }
  in_root tc -j -r qdisc show dev host0 root | sed 's/.*"burst":\([0-9]*\).*"lat":\([0-9]*\).*/\1 \2/' |
    awk '{ printf "%d %.0f\n", $1, $2 / 1000000 }'
}
counter() { in_root tc -s -j qdisc show dev host0 root | sed "s/.*\"$1\":\([0-9]*\).*/\1/"; }

expected=yes
for rate in 16000000 15000000 10000000 1000000; do
  numbers=$(limits "$rate")
  burst=${numbers% *} wait=${numbers#* }
  echo "asked for $rate bit/s and a burst of 536870911 bytes: a burst of $burst bytes, a queue of up to $wait s"
  if [ "$rate" = 16000000 ]; then
    [ "$burst" -gt 536000000 ] && [ "$wait" -lt 2 ] || expected=no
  else
    [ "$burst" -lt 400000000 ] && [ "$wait" -gt 200 ] || expected=no
  fi
done

numbers=$(limits 7812500)
before=$(counter drops)
for _ in 1 2 3 4 5; do head -c 1000 /dev/zero >/dev/udp/10.9.0.2/9; done
sleep 1
dropped=$(($(counter drops) - before))
echo "asked for 7812500 bit/s and the same burst: a burst of ${numbers% *} bytes, and of 5 packets of 1000 bytes $dropped were dropped"
[ "$dropped" -ge 5 ] || expected=no

if [ "$expected" = yes ]; then
  echo "as described"
else
  echo "CHANGED: the burst that was asked for is no longer cut to something else at low rates"
  exit 1
fi
