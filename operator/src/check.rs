//! `bindery-operator check URL`: whether a running operator answers, for `helm test`; the image has no other client.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

/// The longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks for health and metrics.
///
/// # Errors
/// When one of them is not as it should be.
pub fn run(base: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a thread")?;
    runtime.block_on(check(base))
}

async fn check(base: &str) -> Result<()> {
    let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build()?;
    for (path, word) in [("/healthz", "ok"), ("/metrics", "bindery_operator_leader")] {
        let url = format!("{base}{path}");
        let answer = http.get(&url).send().await.with_context(|| format!("ask {url}"))?;
        let text = answer.error_for_status()?.text().await?;
        ensure!(text.contains(word), "{url}: wanted {word}, got {text:.200}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::admin;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn an_operator_that_serves_is_well_and_an_address_without_one_is_not() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(admin::serve(listener, Metrics::new().unwrap()));
        check(&base).await.unwrap();
        assert!(check("http://127.0.0.1:1").await.is_err());
    }
}
