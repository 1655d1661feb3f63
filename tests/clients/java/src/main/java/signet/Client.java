package signet;

import io.spiffe.bundle.jwtbundle.JwtBundle;
import io.spiffe.bundle.jwtbundle.JwtBundleSet;
import io.spiffe.bundle.x509bundle.X509Bundle;
import io.spiffe.bundle.x509bundle.X509BundleSet;
import io.spiffe.svid.jwtsvid.JwtSvid;
import io.spiffe.svid.x509svid.X509Svid;
import io.spiffe.workloadapi.DefaultWorkloadApiClient;
import io.spiffe.workloadapi.Watcher;
import io.spiffe.workloadapi.WorkloadApiClient;
import io.spiffe.workloadapi.X509Context;
import java.util.Collection;
import java.util.List;
import java.util.Set;
import java.util.TreeSet;
import java.util.function.Consumer;
import java.util.stream.Collectors;

/** A workload written with java-spiffe; {@code ../README.md} says what it prints. */
public final class Client {
    private Client() {}

    public static void main(String[] arguments) {
        int code = 0;
        try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) {
            if (arguments.length == 2 && arguments[0].equals("once")) {
                once(client, arguments[1]);
            } else if (arguments.length == 1 && arguments[0].equals("watch")) {
                watch(client);
            } else {
                throw new IllegalArgumentException("usage: once AUDIENCE | watch");
            }
            print("end", "");
        } catch (Exception error) {
            failed(error);
            code = 1;
        }
        System.exit(code);
    }

    private static void once(WorkloadApiClient client, String audience) throws Exception {
        x509Svids(client.fetchX509Context().getX509Svids());
        x509Bundles(client.fetchX509Bundles());
        JwtSvid jwt = client.fetchJwtSvid(audience);
        print(
                "jwt_svid",
                ",\"id\":" + quote(jwt.getSpiffeId().toString()) + ",\"audience\":" + list(jwt.getAudience())
                        + ",\"expires_at\":" + jwt.getExpiry().getTime() / 1000);
        JwtBundleSet bundles = client.fetchJwtBundles();
        jwtBundles(bundles);
        valid(client.validateJwtSvid(jwt.getToken(), audience), "agent");
        valid(JwtSvid.parseAndValidate(jwt.getToken(), bundles, Set.of(audience)), "library");
    }

    private static void watch(WorkloadApiClient client) throws Exception {
        client.watchX509Context(watcher((X509Context update) -> {
            x509Bundles(update.getX509BundleSet());
            x509Svids(update.getX509Svids());
        }));
        client.watchJwtBundles(watcher(Client::jwtBundles));
        System.in.readAllBytes();
    }

    private static <T> Watcher<T> watcher(Consumer<T> updated) {
        return new Watcher<>() {
            @Override
            public void onUpdate(T update) {
                updated.accept(update);
            }

            @Override
            public void onError(Throwable error) {
                failed(error);
            }
        };
    }

    private static void valid(JwtSvid jwt, String by) {
        print("jwt_valid", ",\"id\":" + quote(jwt.getSpiffeId().toString()) + ",\"by\":" + quote(by));
    }

    private static void x509Svids(List<X509Svid> svids) {
        for (X509Svid svid : svids) {
            print(
                    "x509_svid",
                    ",\"id\":" + quote(svid.getSpiffeId().toString())
                            + ",\"serial\":" + quote(svid.getLeaf().getSerialNumber().toString())
                            + ",\"not_after\":" + svid.getLeaf().getNotAfter().getTime() / 1000);
        }
    }

    private static void x509Bundles(X509BundleSet bundles) {
        for (X509Bundle bundle : bundles.getBundles().values()) {
            print(
                    "x509_bundle",
                    ",\"trust_domain\":" + quote(bundle.getTrustDomain().getName())
                            + ",\"authorities\":" + bundle.getX509Authorities().size());
        }
    }

    private static void jwtBundles(JwtBundleSet bundles) {
        for (JwtBundle bundle : bundles.getBundles().values()) {
            print(
                    "jwt_bundle",
                    ",\"trust_domain\":" + quote(bundle.getTrustDomain().getName())
                            + ",\"keys\":" + list(bundle.getJwtAuthorities().keySet()));
        }
    }

    private static void failed(Throwable error) {
        StringBuilder text = new StringBuilder(error.toString());
        for (Throwable cause = error.getCause(); cause != null; cause = cause.getCause()) {
            text.append(": ").append(cause);
        }
        print("error", ",\"text\":" + quote(text.toString()));
    }

    private static synchronized void print(String event, String members) {
        System.out.println("{\"event\":" + quote(event) + members + "}");
        System.out.flush();
    }

    private static String list(Collection<String> values) {
        return new TreeSet<>(values).stream().map(Client::quote).collect(Collectors.joining(",", "[", "]"));
    }

    private static String quote(String value) {
        StringBuilder quoted = new StringBuilder("\"");
        for (char character : value.toCharArray()) {
            if (character == '"' || character == '\\') {
                quoted.append('\\').append(character);
            } else if (character < ' ') {
                quoted.append(String.format("\\u%04x", (int) character));
            } else {
                quoted.append(character);
            }
        }
        return quoted.append('"').toString();
    }
}
