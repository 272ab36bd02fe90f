#!/bin/sh
# A CNI plugin that does what the file beside it says, and notes what it was told.
read_all=$(cat)

# Writes the result of the plugin before this one, as chained plugins do.
previous() {
    printf '%s' "$read_all" | awk '{
        text = substr($0, index($0, "\"prevResult\":") + 13)
        for (at = 1; at <= length(text); at++) {
            char = substr(text, at, 1)
            depth += (char == "{") - (char == "}")
            if (depth == 0) { print substr(text, 1, at); exit }
        }
    }'
}

printf '%s\n' "$CNI_COMMAND $(basename "$0")" >> "$(dirname "$0")/calls"
printf '%s' "$read_all" > "$0.$CNI_COMMAND.stdin"
env | grep '^CNI_' | sort > "$0.$CNI_COMMAND.env"
. "$0.does"
