//! Which addresses a download may reach. A tenant names the source, so that by default nothing inside the network is one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::{Attempt, Policy};

/// Redirects that are followed.
const REDIRECTS: usize = 5;

/// Where downloads may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Everywhere,
    /// Neither loopback, nor link-local, nor private addresses.
    Public,
}

impl Reach {
    /// Of a client that goes nowhere else, also by name or redirect.
    pub(super) fn client(self) -> reqwest::ClientBuilder {
        let builder = reqwest::Client::builder()
            .user_agent(concat!("bindery/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(60))
            // A redirect to another host loses the Authorization header: reqwest takes it away.
            .redirect(Policy::custom(move |attempt| self.follow(attempt)));
        match self {
            Self::Everywhere => builder,
            // A proxy would resolve names by itself.
            Self::Public => builder.no_proxy().dns_resolver(Arc::new(PublicNames)),
        }
    }

    /// # Errors
    /// When the address is one that may not be reached. Names are looked at when they are resolved.
    pub fn check(self, url: &Url) -> Result<(), String> {
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        match host.parse::<IpAddr>() {
            Ok(address) if self == Self::Public && !is_public(address) => {
                Err(format!("{address} is not a public address: the node agent does not reach it"))
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn follow(self, attempt: Attempt) -> reqwest::redirect::Action {
        match self.check_redirect(attempt.previous(), attempt.url()) {
            Ok(()) => attempt.follow(),
            Err(refused) => attempt.error(refused),
        }
    }

    /// # Errors
    /// When a redirect to `next` is not followed from the last of `previous`, which begins with the first address.
    fn check_redirect(self, previous: &[Url], next: &Url) -> Result<(), String> {
        if previous.len() > REDIRECTS {
            return Err(format!("more than {REDIRECTS} redirects"));
        }
        if previous.last().is_some_and(|from| from.scheme() == "https") && next.scheme() != "https"
        {
            return Err("a redirect leads from https to http".into());
        }
        self.check(next)
    }
}

/// Resolves names as the system does and passes on public addresses alone.
#[derive(Debug)]
struct PublicNames;

impl Resolve for PublicNames {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let public: Vec<SocketAddr> = found.filter(|found| is_public(found.ip())).collect();
            if public.is_empty() {
                return Err(format!("{} has no public address", name.as_str()).into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(mapped) => is_public_v4(mapped),
            None => is_public_v6(address),
        },
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    // RFC 6598 shared space, RFC 6890 protocol assignments, RFC 2544 benchmarks, and what is reserved.
    let special =
        (a == 100 && b & 0xc0 == 64) || (a, b, c) == (192, 0, 0) || (a == 198 && b & 0xfe == 18);
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || special)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let first = address.segments()[0];
    // Global unicast alone; 6to4, Teredo and NAT64 could carry a private address inside.
    first & 0xe000 == 0x2000 && first != 0x2002 && !(first == 0x2001 && address.segments()[1] == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_inside_a_network_are_not_public() {
        for inside in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "192.0.0.8",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
            "ff02::1",
        ] {
            assert!(!is_public(inside.parse().unwrap()), "{inside}");
            let host = if inside.contains(':') { format!("[{inside}]") } else { inside.to_owned() };
            let url = Url::parse(&format!("https://{host}/m.gguf")).unwrap();
            assert!(Reach::Public.check(&url).is_err() && Reach::Everywhere.check(&url).is_ok());
        }
        for public in ["1.1.1.1", "104.16.0.1", "2606:4700::1111", "::ffff:1.1.1.1"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
    }

    fn words(error: &reqwest::Error) -> String {
        let mut words = String::new();
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        while let Some(error) = cause {
            words += &error.to_string();
            cause = error.source();
        }
        words
    }

    #[tokio::test]
    async fn a_name_of_this_machine_is_not_reached() {
        let client = Reach::Public.client().build().unwrap();
        let words = words(&client.get("http://localhost:1/").send().await.unwrap_err());
        assert!(words.contains("no public address"), "{words}");
    }

    #[test]
    fn a_redirect_keeps_to_public_addresses_and_to_https_and_ends() {
        let url = |text: &str| Url::parse(text).unwrap();
        let check = |reach: Reach, previous: &[&str], next: &str| {
            let previous: Vec<_> = previous.iter().map(|text| url(text)).collect();
            reach.check_redirect(&previous, &url(next))
        };
        let (plain, safe) = ("http://a.example/", "https://a.example/");
        for (reach, previous, next, word) in [
            (Reach::Public, [safe].as_slice(), "https://b.example/", None),
            (Reach::Public, &[plain], safe, None),
            (Reach::Public, &[plain], plain, None),
            (Reach::Public, &[safe], "https://10.0.0.1/", Some("public")),
            (Reach::Public, &[safe], "https://[::1]/", Some("public")),
            (Reach::Everywhere, &[safe], "https://10.0.0.1/", None),
            (Reach::Everywhere, &[safe], plain, Some("https to http")),
            // What counts is where the redirect comes from.
            (Reach::Everywhere, &[plain, safe], plain, Some("https to http")),
            (Reach::Everywhere, &[safe; 5], safe, None),
            (Reach::Everywhere, &[safe; 6], safe, Some("more than 5")),
        ] {
            let refused = check(reach, previous, next).err();
            let expected = match (&refused, word) {
                (Some(refused), Some(word)) => refused.contains(word),
                (refused, word) => refused.is_none() && word.is_none(),
            };
            assert!(expected, "{previous:?} {next}: {refused:?}");
        }
    }

    #[tokio::test]
    async fn a_public_server_does_not_lead_inside() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, seen_by_server) = std::sync::mpsc::channel();
        let router = axum::Router::new().fallback(async move |uri: axum::http::Uri| {
            seen.send(uri.path().to_owned()).unwrap();
            let host = if uri.path() == "/address" { "127.0.0.1" } else { "localhost" };
            axum::response::Redirect::temporary(&format!("http://{host}:{}/in", address.port()))
        });
        tokio::spawn(async move { axum::serve(listener, router).await });
        // A name whose address is not looked up stands for a public server.
        let client = Reach::Public.client().resolve("public.example", address).build().unwrap();
        for (path, word) in [("/address", "not a public"), ("/name", "no public address")] {
            let url = format!("http://public.example:{}{path}", address.port());
            let words = words(&client.get(url).send().await.unwrap_err());
            assert!(words.contains(word), "{words}");
            assert_eq!(seen_by_server.try_iter().collect::<Vec<_>>(), [path]);
        }
    }
}
