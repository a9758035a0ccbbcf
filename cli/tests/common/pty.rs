//! A shell with job control on a terminal of its own, driven as by a person.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use super::{eventually, sys};

/// An interactive shell; what it and its jobs print is collected.
#[derive(Debug)]
pub struct Shell {
    master: File,
    child: Child,
    printed: Arc<Mutex<String>>,
}

impl Shell {
    /// Starts bash on a new terminal.
    pub fn start() -> Self {
        let (master, path) = sys::open_terminal().unwrap();
        let side = File::options().read(true).write(true).open(path).unwrap();
        let mut command = Command::new("/bin/bash");
        command
            .args(["--norc", "--noprofile", "-i"])
            .env("PS1", "PROMPT> ")
            .env("HISTFILE", "");
        let copy = || Stdio::from(side.try_clone().unwrap());
        command.stdin(copy()).stdout(copy()).stderr(copy());
        sys::before_exec(&mut command, sys::take_terminal);
        sys::before_exec(&mut command, sys::terminal_signals_as_usual);
        let child = command.spawn().unwrap();
        let printed = Arc::new(Mutex::new(String::new()));
        let (mut reader, collected) = (master.try_clone().unwrap(), Arc::clone(&printed));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The master reads an error once the last process has left the terminal.
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                collected
                    .lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        Self {
            master,
            child,
            printed,
        }
    }

    /// Types keys as they are.
    pub fn keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the text has been printed, and forgets all up to its end. Returns what came before it.
    pub fn expect(&mut self, text: &str) -> String {
        let mut before = String::new();
        eventually(
            &format!(
                "{text:?} on the terminal, after {:?}",
                self.printed.lock().unwrap()
            ),
            || {
                let mut printed = self.printed.lock().unwrap();
                let Some(at) = printed.find(text) else {
                    return false;
                };
                before = printed[..at].to_owned();
                *printed = printed[at + text.len()..].to_owned();
                true
            },
        );
        before
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        sys::kill(self.child.id() as i32, libc::SIGHUP);
        sys::kill(self.child.id() as i32, libc::SIGKILL);
        let _ = self.child.wait();
    }
}
