//! Batches made ahead of time on a thread of their own, delivered in the order of the steps.

use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

/// An iterator over what `source` makes of each step, prefetched in the background.
///
/// An error of the source is delivered at its step, after all earlier batches, and ends the iteration. Dropping the
/// loader stops the thread, after the batch that it is at. A panic in the source is carried on where the batch is
/// asked for.
pub struct Loader<T> {
    /// `None` once the iteration has ended.
    batches: Option<Receiver<Result<T>>>,
    worker: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Loader<T> {
    /// Starts making `source(step)` for the `steps` in order. At most `depth` batches wait to be taken, while the
    /// thread works on one more. Errors: the thread cannot be started.
    pub fn new(
        steps: Range<u64>,
        depth: usize,
        mut source: impl FnMut(u64) -> Result<T> + Send + 'static,
    ) -> Result<Self> {
        let (sender, receiver) = sync_channel(depth);
        let work = move || {
            for step in steps {
                let batch = source(step);
                let last = batch.is_err();
                // A failed send means that the loader was dropped.
                if sender.send(batch).is_err() || last {
                    return;
                }
            }
        };
        let worker = std::thread::Builder::new()
            .name("loader".into())
            .spawn(work)
            .map_err(|e| Error::run("cannot start the loader's thread").detail(e.to_string()).source(e))?;
        Ok(Self { batches: Some(receiver), worker: Some(worker) })
    }
}

impl<T> Iterator for Loader<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        match self.batches.as_ref()?.recv() {
            Ok(Ok(batch)) => Some(Ok(batch)),
            Ok(Err(e)) => {
                self.batches = None;
                Some(Err(e))
            }
            // The thread has ended: all steps done, or a panic.
            Err(_) => {
                self.batches = None;
                if let Some(Err(panic)) = self.worker.take().map(JoinHandle::join) {
                    std::panic::resume_unwind(panic);
                }
                None
            }
        }
    }
}

impl<T> Drop for Loader<T> {
    fn drop(&mut self) {
        self.batches = None; // first, or a thread that waits to send would never end
        if let Some(worker) = self.worker.take() {
            // A panic that nobody has asked for has been reported on standard error by the thread itself.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    #[test]
    fn steps_come_in_order_and_no_further_ahead_than_the_depth() {
        let (called, taken, lead) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (taken_there, lead_there) = (taken.clone(), lead.clone());
        let source = move |step| {
            let calls = called.fetch_add(1, SeqCst) + 1;
            lead_there.fetch_max(calls - taken_there.load(SeqCst), SeqCst);
            Ok(step * 10)
        };
        let mut steps = 5;
        for batch in Loader::new(5..300, 2, source).unwrap() {
            taken.fetch_add(1, SeqCst);
            assert_eq!(batch.unwrap(), steps * 10);
            steps += 1;
        }
        assert_eq!(steps, 300);
        // Two wait, one is being made, one has been received but not counted yet.
        assert!(lead.load(SeqCst) <= 4, "{}", lead.load(SeqCst));
    }

    #[test]
    fn an_error_comes_at_its_step_and_ends_the_iteration() {
        let source = |step| if step < 3 { Ok(step) } else { Err(Error::run(format!("step {step}"))) };
        let mut loader = Loader::new(0..10, 8, source).unwrap();
        for step in 0..3 {
            assert_eq!(loader.next().unwrap().unwrap(), step);
        }
        assert_eq!(loader.next().unwrap().unwrap_err().to_string(), "step 3");
        assert!(loader.next().is_none());
    }

    #[test]
    fn dropping_the_loader_ends_its_thread() {
        let alive = Arc::new(());
        let held = alive.clone();
        let mut loader = Loader::new(0..u64::MAX, 1, move |step| Ok((step, Arc::strong_count(&held)))).unwrap();
        assert_eq!(loader.next().unwrap().unwrap().0, 0);
        drop(loader);
        assert_eq!(Arc::strong_count(&alive), 1, "the thread and its source are gone");
    }

    #[test]
    #[should_panic(expected = "in the source")]
    fn a_panic_in_the_source_reaches_the_consumer() {
        let mut loader = Loader::new(0..2, 1, |step| if step == 0 { Ok(()) } else { panic!("in the source") }).unwrap();
        assert!(loader.next().unwrap().is_ok());
        loader.next();
    }
}
