//! An error for people: with what it came from, each once.

use std::error::Error;

/// The error's sentence and those of its causes, with colons between. What a sentence quotes already is not said again.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut said = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !said.contains(&text) {
            said += &format!(": {text}");
        }
        source = cause.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failure {
        #[error("cannot read it: {source}")]
        Quoting { source: io::Error },
        #[error("cannot read it")]
        Plain { source: io::Error },
    }

    #[test]
    fn each_is_said_once() {
        let source = || io::Error::other("the disk is gone");
        for failure in [Failure::Quoting { source: source() }, Failure::Plain { source: source() }] {
            assert_eq!(causes(&failure), "cannot read it: the disk is gone");
        }
    }
}
