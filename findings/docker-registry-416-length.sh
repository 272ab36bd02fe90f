#!/usr/bin/env bash
# docker-registry: the answer 416 to a download that is already complete has the length of the whole blob and a body of 33 bytes.
#
# What one would guess: whoever asks for the rest of a blob from its end on is told 416, as HTTP demands, with a Content-Range that
# says how long the blob is; the body is an error message, and Content-Length is the length of that message.
# What happens: Content-Length is the length of the blob. The message follows, 33 bytes, and then the connection is closed. So a client
# that reads the body before it looks at the status waits for a blob that never comes, and reports that the connection broke (curl:
# exit code 18) instead of a 416; and one that takes a broken connection as a reason to resume asks the same again.
# Seen with: docker-registry 2.8.2+ds1-1 of Debian 12, asked with curl 7.88.1-10+deb12u15. It was built with Go 1.19, and the mistake is
# in that Go's HTTP library: 2.8.3+ds1-2+b8 of Debian 13, built with Go 1.24, says Content-Length 33. So what counts is the compiler of
# a registry's build, which its version does not tell.
# Seen output:
#   HTTP/1.1 206 Partial Content
#     Content-Length 10, Content-Range "bytes 99990-99999/100000", curl exits with 0 after 10 bytes
#   HTTP/1.1 416 Requested Range Not Satisfiable
#     Content-Length 100000, Content-Range "bytes */100000", curl exits with 18 after 33 bytes
#   body: invalid range: failed to overlap
# Why it matters: a download whose connection broke after its last byte is resumed in just this way. A client has to read the status
# first, must not wait for the body, and should then let the digest decide, as it has all bytes already.
set -eu

# Unpacks packages of Debian 12, each given as NAME=VERSION, and what they depend on into $dir/root. The machine itself gets
# nothing installed. Ends with 2 if a version is not to be had, which says nothing about the behaviour.
unpack() {
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg mirror deb
  mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial" "$dir/root"
  touch "$dir/apt/status"
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
  [ -n "$mirror" ] || { echo "apt knows no archive of Debian yet: run apt-get update once" >&2; exit 2; }
  echo "deb [signed-by=$keyring] $mirror bookworm main" >"$dir/apt/sources"
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
  unpack docker-registry=2.8.2+ds1-1 curl=7.88.1-10+deb12u15
  unshare --mount --net --pid --fork --kill-child --propagation private bash "$0" inside "$dir"
  exit
fi
root=$2/root
ip link set lo up
mkdir -p "$root/dev" "$root/proc" "$root/work"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
cd "$root/work"

size=100000
head -c "$size" /dev/zero >blob
digest=$(sha256sum <blob | cut -d ' ' -f 1)
blobs=data/docker/registry/v2/blobs/sha256/${digest:0:2}/$digest
links=data/docker/registry/v2/repositories/app/_layers/sha256/$digest
mkdir -p "$blobs" "$links"
mv blob "$blobs/data"
printf 'sha256:%s' "$digest" >"$links/link"
cat >config.yml <<'EOF'
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: /work/data}}
http: {addr: "127.0.0.1:5000"}
EOF
chroot "$root" /usr/bin/docker-registry serve /work/config.yml >log 2>&1 &

ask() { # CURL'S ARGUMENTS: prints "exit code of curl, bytes of the body", and leaves its head in the file "answer"
  local code=0 url=http://127.0.0.1:5000/v2/app/blobs/sha256:$digest
  : >body
  chroot "$root" /usr/bin/curl --silent --max-time 20 --dump-header /work/answer --output /work/body "$@" "$url" || code=$?
  echo "$code $(stat -c %s body)"
}
for _ in $(seq 50); do
  if [ "$(ask)" = "0 $size" ]; then break; fi
  sleep 0.2
done
field() { tr -d '\r' <answer | sed -n "s|^$1: ||Ip"; }
show() { # NUMBERS: what ask printed
  sed 's/\r//; q' answer
  echo "  Content-Length $(field content-length), Content-Range \"$(field content-range)\", curl exits with ${1% *} after ${1#* } bytes"
}

rest=$(ask --range "$((size - 10))-")
show "$rest"
none=$(ask --range "$size-")
show "$none"
echo "body: $(cat body)"

if [ "$rest" = "0 10" ] && grep -q '^HTTP/1.1 416' answer && [ "$(field content-length)" = "$size" ] &&
  [ "${none#* }" -lt 1000 ] && [ "${none% *}" = 18 ]; then
  echo "as described"
else
  echo "CHANGED: the answer 416 now has a length that fits its body, or the range is answered otherwise"
  exit 1
fi
