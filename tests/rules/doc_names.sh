#!/usr/bin/env bash
# doc_names.sh ROOT: what the documents name is there: links, files (an address is a unique name), and sfa_... symbols. And every
# public call is named in one of them at least.
. "$(dirname "$0")/rule_lib.sh"
root=$1
names=$(tree_files "$root" '*' | sed 's|.*/||' | sort -u)
words=$(cd "$root" && grep -rhoE '\bsfa_[a-z0-9_]+' include src app tests scripts cmake CMakeLists.txt 2>/dev/null | sort -u || true)

count=0
while read -r document; do
  count=$((count + 1))
  folder=$(dirname "$document")
  while IFS=: read -r line link; do
    [ -e "$root/$folder/$link" ] || fault "$document:$line: the link $link leads nowhere"
  done < <(grep -noE '\]\([^)#:]+' "$root/$document" | sed 's/](//')
  while IFS=: read -r line name; do
    [[ $name != _* && $name != llama2.c ]] || continue # the end of a name; a project
    grep -qxF -- "${name##*/}" <<<"$names" || fault "$document:$line: there is no $name"
    case $name in
    src/* | tests/* | include/* | scripts/* | tools/* | app/* | examples/*) [ -e "$root/$name" ] || fault "$document:$line: there is no $name" ;;
    esac
  done < <(grep -noP '(?<![\w.*>/~-])[\w./-]*\w\.(c|h|sh|def|cmake|py)\b(?![\w*])' "$root/$document")
  while IFS=: read -r line symbol; do
    grep -qxF -- "$symbol" <<<"$words" || fault "$document:$line: there is no $symbol"
  done < <(grep -noP '(?<![\w/])sfa_[a-z0-9_]*[a-z0-9]\b(?![<*])' "$root/$document")
done < <(tree_files "$root" '*.md')

named=$(tree_files "$root" '*.md' | (cd "$root" && xargs -r grep -ohE '\bsfa_[a-z0-9_]+') | sort -u)
while IFS=: read -r header line call; do
  grep -qxF -- "$call" <<<"$named" || fault "$header:$line: no document names $call: docs/API.md is the place"
done < <(cd "$root" && grep -HnoP '^SFA_API [^(]*?\Ksfa_\w+(?=\()' include/sfa/*.h)
rule_end doc_names $count
