//! What the daemons have in common: logs, signals, names, the word that they are ready.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};

/// What is logged unless `FARPAGE_LOG` says otherwise.
const DEFAULT_LOG: &str = "warn";

/// Logs as much as `FARPAGE_LOG` asks for (`debug`, `farpage_agent=trace`, ...), to standard error or to the end of the
/// file that `FARPAGE_LOG_FILE` names: the parts that `run` brings up have no standard error that anybody sees.
pub(crate) fn start_logging() {
    let filter = std::env::var("FARPAGE_LOG").unwrap_or_else(|_| DEFAULT_LOG.to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(DEFAULT_LOG));
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    let file = std::env::var_os("FARPAGE_LOG_FILE").and_then(|path| {
        std::fs::File::options()
            .create(true)
            .append(true)
            .open(path)
            .ok()
    });
    // A second call finds a subscriber set already, which is as good.
    let _ = match file {
        Some(file) => builder
            .with_writer(std::sync::Mutex::new(file))
            .with_ansi(false)
            .try_init(),
        None => {
            let ansi = io::stderr().is_terminal();
            builder.with_writer(io::stderr).with_ansi(ansi).try_init()
        }
    };
}

/// Writes a word to standard output at once; a closed one is no reason to fail.
pub(crate) fn say(word: &str) {
    let mut out = io::stdout();
    let _ = out.write_all(word.as_bytes()).and_then(|()| out.flush());
}

/// A name for a daemon that was given none: the host's, and the process id to tell two on one host apart.
pub(crate) fn default_id() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = Some(host.trim())
        .filter(|host| !host.is_empty())
        .unwrap_or("host");
    format!("{host}-{}", std::process::id())
}

/// Completes on SIGTERM or SIGINT.
pub(crate) async fn told_to_stop() {
    let (Ok(mut term), Ok(mut int)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        // Without a handler the signals keep their default action, which ends the process as well.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// Sets `stop` on SIGTERM or SIGINT, by a thread of its own.
pub(crate) fn stop_on_signals(stop: &Arc<AtomicBool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let stop = Arc::clone(stop);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            runtime.block_on(told_to_stop());
            stop.store(true, Ordering::Release);
        })?;
    Ok(())
}
