#!/bin/sh
# The runc beside this file, asked for everything but CAP_SYS_RESOURCE: a machine that lacks it, as
# many sandboxes do, cannot give it to a container. The capabilities of a container stand in its
# bundle's config.json, those of an exec in a file that is named.
bundle=. process= verb= previous=
for argument in "$@"; do
    case $previous in
        --bundle | -b) bundle=$argument ;;
        --process | -p) process=$argument ;;
    esac
    case $argument in
        --bundle=*) bundle=${argument#*=} ;;
        --process=*) process=${argument#*=} ;;
        create | run | exec) verb=${verb:-$argument} ;;
    esac
    previous=$argument
done
case $verb in
    create | run) spec=$bundle/config.json ;;
    exec) spec=$process ;;
    *) spec= ;;
esac
if [ -f "$spec" ]; then
    sed -i -E 's/"CAP_SYS_RESOURCE" *, *|, *"CAP_SYS_RESOURCE"|"CAP_SYS_RESOURCE"//g' "$spec"
fi
exec "${0%/*}/runc" "$@"
