#!/bin/sh
# Installs hypura: finds out what this machine is, downloads the release for it, verifies its checksum, and puts one file
# into ~/.local/bin or a folder that is given. Nothing is changed before everything is verified, and nothing is left behind
# when something fails. It needs sh, curl or wget, tar, gzip, and sha256sum or shasum.
set -eu

# The release writes its own address here.
release_url=""

main() {
    to="${HOME:-}/.local/bin"
    from="$release_url"
    while [ $# -gt 0 ]; do
        case "$1" in
        --to | --from)
            [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
            if [ "$1" = --to ]; then to="$2"; else from="${2%/}"; fi
            shift 2
            ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) fail "there is no option $1: see sh install.sh --help" ;;
        esac
    done
    [ -n "$from" ] || fail "this install.sh is of no release: give --from URL, or take the one of a release"
    [ "$to" != "/.local/bin" ] || fail "HOME is not set: give --to FOLDER"

    name="hypura-$(platform).tar.gz"
    made="" # the folder, where it was not there before
    scratch="$(mktemp -d "${TMPDIR:-/tmp}/hypura-install.XXXXXX")" || fail "no temporary folder can be made: set TMPDIR"
    placed=""
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP

    say "downloading $from/$name"
    download "$from/SHA256SUMS" "$scratch/SHA256SUMS"
    download "$from/$name" "$scratch/$name"
    verify "$name"
    tar -xzf "$scratch/$name" -C "$scratch" hypura || fail "$name does not unpack: try again"
    place
    say "installed $("$to/hypura" version) as $to/hypura"
    case ":${PATH:-}:" in
    *":$to:"*) ;;
    *) say "$to is not in PATH: add it, as in  export PATH=\"$to:\$PATH\"" ;;
    esac
    caches=".cache"
    [ "$(uname -s)" != Darwin ] || caches="Library/Caches"
    say "to undo: rm $to/hypura  (and rm -r ~/.hypura ~/$caches/hypura for what it measured and unpacked)"
}

usage() {
    cat <<'END'
sh install.sh [--to FOLDER] [--from URL]
  --to FOLDER   where to put hypura (default: ~/.local/bin)
  --from URL    where the release's files are (default: the release that this script is of)
Examples:
  sh install.sh
  sh install.sh --to /usr/local/bin
  curl -fsSL URL/install.sh | sh -s -- --to ~/bin
END
}

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

clean_up() {
    rm -rf "$scratch"
    [ -z "$placed" ] || rm -f "$placed"
    [ -z "$made" ] || rmdir "$made" 2>/dev/null || true
}

platform() {
    system="$(uname -s)" machine="$(uname -m)"
    case "$system-$machine" in
    Linux-x86_64 | Linux-amd64) linux linux-x64 ;;
    Linux-aarch64 | Linux-arm64) linux linux-arm64 ;;
    Darwin-arm64) echo darwin-arm64 ;;
    # A shell under Rosetta on Apple silicon says x86_64.
    Darwin-x86_64)
        [ "$(sysctl -n hw.optional.arm64 2>/dev/null || echo 0)" = 1 ] || fail "there is no release for Macs with Intel processors"
        echo darwin-arm64
        ;;
    *) fail "there is no release for $system on $machine: build it from the sources" ;;
    esac
}

# musl's loader has another name than glibc's; hypura's releases need glibc.
linux() {
    for loader in /lib/ld-musl-*; do
        [ -e "$loader" ] && ! [ -e /lib64/ld-linux-x86-64.so.2 ] && ! [ -e /lib/ld-linux-aarch64.so.1 ] &&
            fail "this Linux has musl (Alpine?), the release needs glibc: build it from the sources"
    done
    echo "$1"
}

download() {
    if command -v curl >/dev/null 2>&1; then
        curl --fail --silent --show-error --location --retry 2 --output "$2" "$1" || fail "$1 could not be downloaded"
    elif command -v wget >/dev/null 2>&1; then
        wget -q -O "$2" "$1" || fail "$1 could not be downloaded"
    else
        fail "neither curl nor wget is here: install one"
    fi
}

verify() {
    wanted="$(sed -n "s/^\([0-9a-f]\{64\}\)  $1\$/\1/p" "$scratch/SHA256SUMS")"
    [ -n "$wanted" ] || fail "the release has no checksum for $1: it was not made for this machine"
    if command -v sha256sum >/dev/null 2>&1; then
        found="$(sha256sum "$scratch/$1")"
    elif command -v shasum >/dev/null 2>&1; then
        found="$(shasum -a 256 "$scratch/$1")"
    else
        fail "neither sha256sum nor shasum is here: install one"
    fi
    [ "${found%% *}" = "$wanted" ] || fail "$1 is not what the release says (checksum ${found%% *}, wanted $wanted): try again"
}

# Into the folder beside its place, started once, and only then renamed: an older hypura stays until the new one works.
place() {
    if ! [ -d "$to" ]; then
        mkdir -p "$to" || fail "$to cannot be made: give another folder with --to"
        made="$to"
    fi
    to="$(cd "$to" && pwd)"
    placed="$to/.hypura-install.$$"
    cp "$scratch/hypura" "$placed" || fail "$to cannot be written: give another folder with --to"
    chmod 755 "$placed"
    "$placed" version >/dev/null || fail "hypura does not start on this machine (see above); nothing was installed"
    mv -f "$placed" "$to/hypura"
    placed="" made=""
}

# In a function, so that a download of this script that was cut off does nothing.
main "$@"
