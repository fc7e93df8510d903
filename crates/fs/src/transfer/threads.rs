//! The threads of a transfer: what is started when it opens, and what each of them does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, bounded, unbounded};

use super::FsTransfer;
use crate::cache::Cache;
use crate::cold::{Bounce, COLD_READS, COLD_READS_WAITING_MAX, cold_thread};
use crate::control::WriterPlace;
use crate::error::{FsError, Result};
use crate::jobs::lock;
use crate::lister;
use crate::load::{IDLE_CHECK, LoadJob};
use crate::options::Medium;
use crate::shared::{MARK_MS, Shared};
use crate::writer::{Command, StoreTask, Writer};

/// Starts a named thread.
pub(super) type Spawn = dyn Fn(String, Box<dyn FnOnce() + Send>) -> std::io::Result<JoinHandle<()>>;

impl FsTransfer {
    pub(super) fn start_threads(
        &self,
        place: Option<WriterPlace>,
        target_bytes: u64,
        commands: &Receiver<Command>,
        spawn: &Spawn,
    ) -> Result<()> {
        let (shared, abandoned, threads) = (&self.shared, &self.abandoned, self.load_threads);
        let spawn = |name: String, work: Box<dyn FnOnce() + Send>| {
            spawn(name, work)
                .map(|handle| lock(&self.threads).push(handle))
                .map_err(FsError::io("start a thread for", &shared.directory.path))
        };
        let lists = Arc::clone(shared);
        spawn(
            "kvlane-lister".into(),
            Box::new(move || lists.lister.run(|| lister::list(&lists.directory, &lists.index))),
        )?;
        shared.lister.started();
        if let Some(place) = place {
            let (task_sender, tasks) = unbounded();
            for number in 0..threads {
                let (tasks, stop) = (tasks.clone(), Arc::clone(abandoned));
                spawn(
                    format!("kvlane-store-{number}"),
                    Box::new(move || store_thread(&tasks, &stop)),
                )?;
            }
            let writer = Writer::new(Arc::clone(shared), place, target_bytes, task_sender, threads);
            let (commands, stop) = (commands.clone(), Arc::clone(abandoned));
            spawn(
                "kvlane-writer".into(),
                Box::new(move || writer.run(&commands, &stop)),
            )?;
        } else {
            let (keeper, stop) = (Arc::clone(shared), Arc::clone(abandoned));
            spawn(
                "kvlane-keeper".into(),
                Box::new(move || keeper_thread(&keeper, &stop)),
            )?;
        }
        let (load_sender, loads) = unbounded();
        for number in 0..threads {
            let (loads, stop) = (loads.clone(), Arc::clone(abandoned));
            spawn(
                format!("kvlane-load-{number}"),
                Box::new(move || load_thread(&loads, &stop)),
            )?;
        }
        // A cache on a device has its pinned pool to wait for, and everything in memory is there already.
        let has_cold_blocks = shared.directory.choice.medium == Medium::Disk;
        let cold = match &shared.cache {
            Cache::Host(_) if has_cold_blocks => {
                let (sender, reads) = bounded(COLD_READS_WAITING_MAX);
                for number in 0..COLD_READS {
                    let (reads, stop) = (reads.clone(), Arc::clone(abandoned));
                    spawn(
                        format!("kvlane-cold-{number}"),
                        Box::new(move || cold_thread(&reads, &stop)),
                    )?;
                }
                Some(sender)
            }
            _ => None,
        };
        *lock(&self.loads) = Some(load_sender);
        *lock(&self.cold) = cold;
        Ok(())
    }
}

fn store_thread(tasks: &Receiver<StoreTask>, abandoned: &AtomicBool) {
    while !abandoned.load(Ordering::Relaxed) {
        match tasks.recv_timeout(IDLE_CHECK) {
            Ok(StoreTask::Layer(job, layer)) => job.run_layer(layer),
            Ok(StoreTask::Rest(job)) => job.run_rest(),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn load_thread(loads: &Receiver<Arc<LoadJob>>, abandoned: &AtomicBool) {
    let mut bounce = Bounce::default();
    while !abandoned.load(Ordering::Relaxed) {
        match loads.recv_timeout(IDLE_CHECK) {
            Ok(job) => job.run(&mut bounce),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// What a writer thread does on the side, for a transfer that only loads.
fn keeper_thread(shared: &Arc<Shared>, abandoned: &AtomicBool) {
    let mut written: Option<Instant> = None;
    while !abandoned.load(Ordering::Relaxed) {
        if written.is_none_or(|at| at.elapsed() >= Duration::from_millis(MARK_MS)) {
            shared.write_marks();
            shared.measure();
            written = Some(Instant::now());
        }
        std::thread::park_timeout(Duration::from_millis(100));
    }
}
