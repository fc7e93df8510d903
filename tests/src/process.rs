//! Worker processes that tests kill, stop, starve and freeze: the driver of the program `kvlane-test-peer`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::worker::Setup;

/// An answer that takes longer is a hang.
pub const ANSWER: Duration = Duration::from_secs(20);

/// A running `kvlane-test-peer`. Killed when dropped.
pub struct PeerProcess {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    warnings: Arc<Mutex<String>>,
    /// Ends with its standard error.
    errors: JoinHandle<()>,
}

impl PeerProcess {
    /// Starts `program` on `folder` and waits until it has opened it or says why not: the first line it says.
    pub fn open(program: &str, folder: &Path, setup: &Setup) -> (Self, String) {
        let mut process = Self::start(Command::new(program), folder, setup);
        let first = process.line();
        (process, first)
    }

    /// Starts it by a shell that runs `prelude` before, such as `mount ... &&`, in a mount namespace of its own.
    pub fn start_in_namespace(prelude: &str, program: &str, folder: &Path, setup: &Setup) -> Self {
        let mut command = Command::new("unshare");
        let own_user = !rustix::process::geteuid().is_root();
        let namespaces: &[&str] = if own_user {
            &["--user", "--map-root-user", "--mount"]
        } else {
            &["--mount"]
        };
        command.args(namespaces).args(["--", "sh", "-c"]);
        command.arg(format!("{prelude} exec \"$0\" \"$@\"")).arg(program);
        Self::start(command, folder, setup)
    }

    /// Starts a command that becomes the program, without waiting for anything.
    pub fn start(mut command: Command, folder: &Path, setup: &Setup) -> Self {
        command.arg(folder).arg(setup.to_string());
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let stdin = child.stdin.take().expect("it is piped");
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().expect("it is piped"));
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let warnings = Arc::new(Mutex::new(String::new()));
        let (mut errors, kept) = (child.stderr.take().expect("it is piped"), Arc::clone(&warnings));
        let errors = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = errors.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..length]);
                eprint!("{text}");
                kept.lock().expect("no thread panics with it").push_str(&text);
            }
        });
        PeerProcess {
            child,
            stdin,
            lines,
            warnings,
            errors,
        }
    }

    /// The next line it says.
    ///
    /// # Panics
    /// If none comes, or it ends.
    #[track_caller]
    pub fn line(&mut self) -> String {
        match self.lines.recv_timeout(ANSWER) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("the process does not answer:\n{}", self.threads()),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait();
                panic!("the process ended: {status:?}\n{}", self.warnings());
            }
        }
    }

    /// The next line, if one comes within `patience`.
    pub fn line_within(&mut self, patience: Duration) -> Option<String> {
        self.lines.recv_timeout(patience).ok()
    }

    /// Everything it said and that was not asked for yet; all of it once it has ended.
    pub fn rest(&mut self) -> Vec<String> {
        // What was said before the end may still be on its way through the pipe.
        let patience = Duration::from_millis(if self.has_ended() { 200 } else { 0 });
        let mut lines = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(patience) {
            lines.push(line);
        }
        lines
    }

    /// Tells it something without waiting for an answer.
    pub fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("the process reads commands");
    }

    /// Tells it something and returns the answer.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.line()
    }

    /// What it wrote to its standard error so far.
    pub fn warnings(&self) -> String {
        self.warnings.lock().expect("no thread panics with it").clone()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGSTOP; returns once it stands still.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let end = Instant::now() + ANSWER;
        while !self.is_stopped() {
            assert!(Instant::now() < end, "the process does not stop");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// How it ended, if it has.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Waits for its end, and for all of its [`warnings`](Self::warnings), and says whether that was an orderly end.
    pub fn ended_well(&mut self) -> bool {
        let end = Instant::now() + ANSWER;
        while Instant::now() < end {
            if let Ok(Some(status)) = self.child.try_wait()
                && self.errors.is_finished()
            {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }

    /// What its threads are doing, as far as the kernel tells.
    pub fn threads(&self) -> String {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.id())) else {
            return "it is gone".to_owned();
        };
        let describe = |thread: std::fs::DirEntry| {
            let read = |name: &str| std::fs::read_to_string(thread.path().join(name)).unwrap_or_default();
            format!("{}\n{}", read("stat").trim(), read("stack"))
        };
        threads.flatten().map(describe).collect()
    }

    fn signal(&self, signal: Signal) {
        let id = Pid::from_child(&self.child);
        kill_process(id, signal).expect("our own child can be signalled");
    }

    fn is_stopped(&self) -> bool {
        // Every thread has to stand still, not only the first.
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.id())).expect("the process exists");
        threads.flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')')
                .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
        })
    }
}

impl Drop for PeerProcess {
    fn drop(&mut self) {
        self.kill();
        // A crash that nobody saw because the process could not end yet.
        if let Ok(status) = self.child.wait()
            && let Some(signal) = status.signal()
            && (signal != Signal::KILL.as_raw() || std::thread::panicking())
        {
            eprintln!("the process ended by {status}");
        }
    }
}

/// Says that a test cannot run on this machine, in the form that the suite runner counts.
pub fn not_run(what: &str, why: &str) {
    println!("NOT RUN: {what}: {}", why.trim().replace('\n', "; "));
}
