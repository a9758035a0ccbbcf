//! Measuring processes: this binary under its hidden subcommand, alone or under `farpage run`.

use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::{BenchError, CHILD_COMMAND, Options};

/// Starts a measuring process.
pub(crate) fn spawn_child(
    options: &Options,
    words: &[&str],
    more: &[&str],
) -> Result<Child, BenchError> {
    Command::new(&options.farpage)
        .arg(CHILD_COMMAND)
        .args(words)
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(BenchError::system("starting a measuring process"))
}

/// Starts a measuring process under `farpage run`, with the agent that was named or else with everything it needs brought up
/// for it alone. Returns what it printed, and farpage's own account.
pub(crate) fn under_farpage<T: serde::de::DeserializeOwned>(
    options: &Options,
    local: &str,
    far: &str,
    words: &[&str],
) -> Result<(T, Value), BenchError> {
    let account = std::env::temp_dir().join(format!("farpage-bench-{}.json", std::process::id()));
    let mut command = Command::new(&options.farpage);
    command.args(["run", "--local", local, "--far", far]);
    match &options.agent {
        Some(agent) => command.arg("--agent").arg(agent),
        None => command.args(["--fabric", &options.fabric]),
    };
    let child = command
        .args(["--summary", "json", "--summary-file"])
        .arg(&account)
        .arg("--")
        .arg(&options.farpage)
        .arg(CHILD_COMMAND)
        .args(words)
        .env_remove("FARPAGE_AGENT")
        .env_remove("FARPAGE_COORDINATOR")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(BenchError::system("starting farpage run"))?;
    let printed = finish(child, words);
    let summary = std::fs::read(&account).unwrap_or_default();
    let _ = std::fs::remove_file(&account);
    let summary = serde_json::from_slice(&summary).unwrap_or(Value::Null);
    Ok((printed?, summary))
}

/// Waits for a measuring process and takes what it printed.
pub(crate) fn finish<T: serde::de::DeserializeOwned>(
    child: Child,
    words: &[&str],
) -> Result<T, BenchError> {
    let what = || words.join(" ");
    let output = child
        .wait_with_output()
        .map_err(BenchError::system("waiting for a measuring process"))?;
    if !output.status.success() {
        return Err(BenchError::Child {
            what: what(),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    serde_json::from_slice(&output.stdout).map_err(|error| BenchError::Result {
        what: what(),
        error,
    })
}
