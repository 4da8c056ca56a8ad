#!/bin/sh
# The first process of a guest; uml.py copies it into the control folder that it makes for each guest.
#
# Started by the kernel on the host's files, it lays an overlay over them and starts itself again inside.  What it says goes
# to the console; when it ends early the kernel panics, and that is the end of the guest.
stage=${1-}
control=${0%/*}
export PATH="$control/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Gives: end, modules, module_folder, and the folders to write to as positional parameters.
. "$control/settings"

die() { echo "init: $*"; exit 1; }

if [ "$stage" != inside ]; then
    mount -t proc proc /proc || die "no /proc"
    modprobe -d "$control" overlay || die "no overlay module"
    mount -t tmpfs -o size=90% tmpfs "$control/layer" || die "no tmpfs"
    mkdir "$control/layer/upper" "$control/layer/work" "$control/layer/root"
    # nosuid: to a runner in a user namespace others' files belong to nobody, and a set-uid mount(8) would become that.
    mount -t overlay -o "nosuid,lowerdir=/,upperdir=$control/layer/upper,workdir=$control/layer/work" \
        overlay "$control/layer/root" || die "no overlay"
    cd "$control/layer/root" || die "no overlay to enter"
    umount /proc
    mkdir -p .below
    pivot_root . .below || die "no pivot_root"
    exec chroot . /bin/sh "$control/init" inside
fi

umount -l /.below
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
exec </dev/null >/dev/console 2>&1
[ -L /dev/fd ] || ln -s /proc/self/fd /dev/fd
for pair in 0=stdin 1=stdout 2=stderr; do ln -sf "/proc/self/fd/${pair%=*}" "/dev/${pair#*=}"; done
# The host's would lead to the host's daemons and names.
for folder in /run /var/run; do [ -L "$folder" ] || mount -t tmpfs tmpfs "$folder"; done
mkdir -p /run/lock /run/netns /lib/modules
mount --bind "$module_folder" /lib/modules || die "no modules"
hostname guest
ip link set lo up
for folder; do
    mount -t hostfs -o "$folder" none "$folder" || die "no writing to $folder"
done
# shellcheck disable=SC2086 # words are wanted
[ -z "$modules" ] || modprobe -a $modules

# The command gets pipes, as under any runner; the serial lines would be terminals to it.
stty -F /dev/ttyS0 raw -echo
stty -F /dev/ttyS1 raw -echo
mkfifo /run/guest.stdout /run/guest.stderr
cat </run/guest.stdout >/dev/ttyS0 & copy_stdout=$!
cat </run/guest.stderr >/dev/ttyS1 & copy_stderr=$!
setsid /bin/sh "$control/command" >/run/guest.stdout 2>/run/guest.stderr
status=$?
# A process left behind may hold the pipes for ever.
(sleep 2; kill "$copy_stdout" "$copy_stderr") &
wait "$copy_stdout" "$copy_stderr"
sync
# In order behind the last byte, so the runner has everything when it has read these, and need not wait for a shutdown.
printf '%s%03d' "$end" "$status" >/dev/ttyS0
printf '%s%03d' "$end" "$status" >/dev/ttyS1
while :; do sleep 1000; done
