# Sourced by every shell on a node of the cluster: `ray up` adds it to ~/.bashrc.

export PATH="$HOME/mara/.venv/bin:$PATH"

# Every process of Ray shows the token in ~/.ray/auth_token, which `ray up` copies to each node.
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
# Ray gives way to everything else on a machine by default; here its workers are the job.
export RAY_worker_niceness=0

# Address and password of the server that store.py started; on the head only.
if [ -r "$HOME/.mara/store_url" ]; then
    MARA_STORE_URL=$(cat "$HOME/.mara/store_url")
    export MARA_STORE_URL
fi
