//! How a subcommand ended.

/// How a subcommand ended, for scripts that look at the process status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It worked, or a check found nothing wrong.
    Ok,
    /// It did not work, or a check found problems; they were printed.
    Problem,
    /// The arguments make no sense; nothing was done.
    Usage,
}

impl Exit {
    /// The process status. 2 for usage is also what clap gives.
    pub fn status(self) -> i32 {
        match self {
            Self::Ok => 0,
            Self::Problem => 1,
            Self::Usage => 2,
        }
    }
}
