import java.io.BufferedReader;
import java.io.DataInputStream;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.security.SecureRandom;
import java.security.cert.X509Certificate;
import java.util.Arrays;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManager;
import javax.net.ssl.X509TrustManager;

/** Sends as many bytes as each line of its input says, and checks that they come back. */
public class Client {
    public static void main(String[] args) throws Exception {
        TrustManager all = new X509TrustManager() {
            public void checkClientTrusted(X509Certificate[] chain, String type) {}
            public void checkServerTrusted(X509Certificate[] chain, String type) {}
            public X509Certificate[] getAcceptedIssuers() { return new X509Certificate[0]; }
        };
        SSLContext context = SSLContext.getInstance("TLSv1.3");
        context.init(null, new TrustManager[] {all}, new SecureRandom());
        try (SSLSocket s = (SSLSocket) context.getSocketFactory().createSocket(args[0], Integer.parseInt(args[1]))) {
            s.setEnabledProtocols(new String[] {"TLSv1.3"});
            s.setEnabledCipherSuites(new String[] {args[2]});
            s.startHandshake();
            System.out.println(s.getSession().getProtocol() + " " + s.getSession().getCipherSuite());
            OutputStream out = s.getOutputStream();
            DataInputStream in = new DataInputStream(s.getInputStream());
            BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
            long sent = 0;
            for (String line = lines.readLine(); line != null; line = lines.readLine()) {
                for (int left = Integer.parseInt(line.trim()); left > 0; ) {
                    byte[] data = new byte[Math.min(left, 16000)];
                    for (int i = 0; i < data.length; i++) {
                        data[i] = (byte) ((sent + i) * 31 >> 3);
                    }
                    out.write(data);
                    out.flush();
                    byte[] got = new byte[data.length];
                    in.readFully(got);
                    if (!Arrays.equals(data, got)) {
                        throw new IllegalStateException("wrong bytes after " + sent);
                    }
                    sent += data.length;
                    left -= data.length;
                }
                System.out.println("back " + line.trim());
            }
        }
        System.out.println("closed");
    }
}
