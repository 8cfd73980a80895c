# shellcheck shell=bash disable=SC2046,SC2086
# rule_lib.sh: sourced by every rule. A rule takes the tree (or libraries) to judge as arguments, prints each violation as
# "file:line: what is wrong" and ends with rule_end. planted_faults.sh runs each one on a sample that breaks it.
set -eu
export LC_ALL=C
rule_faults=0

fault() {
  printf '%s\n' "$*"
  rule_faults=$((rule_faults + 1))
}

# rule_end NAME COUNT: the verdict. A rule that looked at nothing has not passed.
rule_end() {
  [ "$2" -gt 0 ] || fault "$1: found nothing to look at"
  [ "$rule_faults" = 0 ] || { echo "$1: $rule_faults violation(s)"; exit 1; }
  echo "$1: $2 looked at, none breaks the rule"
}

# tree_files ROOT PATTERN...: files of the project with such a name, relative to ROOT; build outputs and dot folders do not count.
tree_files() {
  local root=$1 name tests=()
  shift
  for name in "$@"; do tests+=(-o -name "$name"); done
  (cd "$root" && find . \( -name '.?*' -o -path ./build -o -path ./demo_out -o -name __pycache__ \) -prune -o -type f \( "${tests[@]:1}" \) -print | sed 's|^\./||' | sort)
}

# code_lines FILE: "line:text" of a C file without comments, and with the insides of strings and characters blanked.
code_lines() {
  awk '
    {
      out = ""; line = $0; n = length(line)
      for (i = 1; i <= n; i++) {
        c = substr(line, i, 1); two = substr(line, i, 2)
        if (comment) { if (two == "*/") { comment = 0; i++ } }
        else if (quote != "") {
          if (c == "\\") i++
          else if (c == quote) { quote = ""; out = out c }
        }
        else if (two == "/*") { comment = 1; i++; out = out " " }
        else if (two == "//") break
        else { if (c == "\"" || c == "\047") quote = c; out = out c }
      }
      if (line !~ /\\$/) quote = ""
      print NR ":" out
    }' "$1"
}
