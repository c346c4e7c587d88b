# bash completion for titus-py(8)

_titus_py() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local options=
    COMPREPLY=()
    case $previous in
        --config | --credentials | --cert | --key | --html)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
            return
            ;;
        --directory)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -d -- "$word")
            return
            ;;
        --kind | --type)
            options='rsa-2048 rsa-3072 rsa-4096 rsa-8192 p-256 p-384 p-521 ed25519'
            mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
            return
            ;;
        --listen | --backend | --server-name | --timeout)
            return
            ;;
        --pid)
            mapfile -t COMPREPLY < <(compgen -W "$(pgrep -f '^titus-py: supervisor')" -- "$word")
            return
            ;;
    esac
    case ${COMP_WORDS[1]} in
        serve) options='--config --listen --backend --cert --key' ;;
        check) options='--config --credentials' ;;
        audit) options='--pid --json --quiet --html' ;;
        status) options='--pid --json --watch' ;;
        rekey)
            options='--config --kind --install --dry-run --pid'
            if [[ $word != -* ]]; then
                compopt -o filenames
                mapfile -t COMPREPLY < <(compgen -d -- "$word")
                return
            fi
            ;;
        reload) options='--pid --program --cut' ;;
        keys)
            case $COMP_CWORD:${COMP_WORDS[2]} in
                2:*) options='new pin' ;;
                *:new) options='--directory --type --force --config' ;;
                *:pin)
                    options='--server-name --starttls --timeout'
                    if [[ $word != -* ]]; then
                        compopt -o filenames
                        mapfile -t COMPREPLY < <(compgen -f -- "$word")
                        return
                    fi
                    ;;
            esac
            ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then
        options='serve check demo audit status reload rekey keys --help --version'
    else
        options="$options --help"
    fi
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
}

complete -F _titus_py titus-py
