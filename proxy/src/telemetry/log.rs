//! The proxy's own log: to standard error, with a filter that can be changed while it runs.

use std::io::IsTerminal;

use thiserror::Error;
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Registry, fmt, reload};

/// Why a filter is not in force.
#[derive(Debug, Error)]
pub enum LogError {
    #[error(
        "'{given}' is not a log filter such as \"info\" or \"weft_proxy=debug,h2=warn\": {source}"
    )]
    Filter { given: String, source: ParseError },
    #[error("a log is already set up: {0}")]
    Installed(#[from] TryInitError),
    #[error("the log cannot be changed any more: {0}")]
    Gone(#[from] reload::Error),
}

/// Changes and tells the filter.
#[derive(Debug, Clone)]
pub struct LogControl {
    handle: reload::Handle<EnvFilter, Registry>,
}

fn parse(given: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(given).map_err(|source| LogError::Filter {
        given: given.to_owned(),
        source,
    })
}

/// Sets up the process's log. Standard output is left to the access log.
///
/// # Errors
/// When the filter cannot be read, or the process has a log already.
pub fn init(filter: &str) -> Result<LogControl, LogError> {
    let (layer, handle) = reload::Layer::new(parse(filter)?);
    tracing_subscriber::registry()
        .with(layer)
        .with(
            fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(std::io::stderr().is_terminal()),
        )
        .try_init()?;
    Ok(LogControl { handle })
}

impl LogControl {
    /// A layer and its control, for a subscriber of the caller's own instead of the process's.
    ///
    /// # Errors
    /// When the filter cannot be read.
    pub fn with_layer(
        filter: &str,
    ) -> Result<(reload::Layer<EnvFilter, Registry>, Self), LogError> {
        let (layer, handle) = reload::Layer::new(parse(filter)?);
        Ok((layer, Self { handle }))
    }

    /// The filter in force.
    ///
    /// # Errors
    /// When the subscriber is gone.
    pub fn filter(&self) -> Result<String, LogError> {
        Ok(self.handle.with_current(ToString::to_string)?)
    }

    /// Puts another filter in force.
    ///
    /// # Errors
    /// When it cannot be read (the old one stays), or the subscriber is gone.
    pub fn set(&self, filter: &str) -> Result<(), LogError> {
        Ok(self.handle.reload(parse(filter)?)?)
    }
}
