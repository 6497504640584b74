#!/usr/bin/env bash
# Merge an adapter, prove the result, publish it. Stops at the first step that fails, with the
# exit code of psoft-export (docs/exit-codes.md), so nothing that is not equivalent is published.
#
#   examples/ci/publish.sh BASE ADAPTER REPO_ID [TEXT]
#
# BASE and ADAPTER are folders or Hub ids (owner/name@revision), TEXT a file of the task's own
# text. Leaves report.html, summary.md and merge.json in the current folder. The Hub token is
# taken from HF_TOKEN.
set -euo pipefail
base=$1 adapter=$2 repository=$3 text=${4:-}

psoft-export merge --base "$base" --adapter "$adapter" --output merged --overwrite \
    --require-record --verify ${text:+--text "$text"} \
    --report report.html --summary summary.md --json > merge.json

psoft-export push merged "$repository" --create-pr \
    --commit-message "Merge $adapter" --quiet
