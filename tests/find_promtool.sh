#!/bin/sh
# Prints the path of promtool. Installs Debian's `prometheus` package when it is missing and this is root on a machine with apt-get.
# Prints nothing and ends with 1 when it cannot be had.
set -u
if ! command -v promtool >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    # A machine in a container must not start the Prometheus server that comes with the tool.
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus; } >&2
fi
command -v promtool && exit 0
cat >&2 <<'WARNING'
********************************************************************************
promtool is missing and could not be installed: the check of the metrics with
promtool is NOT RUN. On Debian or Ubuntu, as root: apt-get install prometheus
********************************************************************************
WARNING
exit 1
